package store_test

import (
	"sync"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// Sequential reads lead to ever larger requests ahead of the reader, in no more
// than MaxWindow; every byte once.
func TestReadahead(t *testing.T) {
	img := storetest.NewImage("sequential", storetest.Solid(1, 64*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		cfg.Memory = 64 * miB
		src := storetest.NewSource("good", img)
		i := openImage(t, open(t, cfg), img, src)
		sameAll(t, i, img.Plain, 128*kiB)
		most := int64(0)
		for _, r := range src.Requests() {
			most = max(most, r.N)
		}
		bound := 14
		if !cfg.Keep {
			bound = 22 // which believes in the reader when it has read some 20 MiB
		}
		if n := len(src.Requests()); n > bound || most != 8*miB {
			t.Errorf("%d requests of at most %d bytes", n, most)
		}
		if src.Twice() > 0 {
			t.Errorf("%d blocks were fetched twice", src.Twice())
		}
	})
}

// The next window is asked for while the reader is in the one before.
func TestReadaheadIsAhead(t *testing.T) {
	img := storetest.NewImage("ahead", storetest.Solid(1, 64*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		src := storetest.NewSource("good", img)
		s := open(t, cfg)
		i := openImage(t, s, img, src)
		for off := int64(0); off <= miB+128*kiB; off += 128 * kiB {
			same(t, i, img.Plain, firstChunk+off, 128*kiB)
		}
		eventually(t, func() bool { r := src.Requests(); return r[len(r)-1].Off == 3*miB })
		for off := miB; off <= 3*miB; off += 128 * kiB {
			same(t, i, img.Plain, firstChunk+off, 128*kiB)
		}
		third := 7 * miB
		if !cfg.Keep {
			third = 5 * miB
		}
		eventually(t, func() bool { r := src.Requests(); return r[len(r)-1].Off == third })
	})
}

// Random reads get one window each and no readahead.
func TestNoReadaheadForRandom(t *testing.T) {
	img := storetest.NewImage("random", storetest.Solid(1, 64*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		src := storetest.NewSource("good", img)
		s := open(t, cfg)
		i := openImage(t, s, img, src)
		for k := range int64(16) {
			same(t, i, img.Plain, firstChunk+(k*29%64)*miB+300*kiB, 4*kiB)
		}
		check(t, i.Close())
		if n := len(src.Requests()); n != 16 || src.Bytes() > 16*miB {
			t.Errorf("%d requests, %d MiB", n, src.Bytes()/miB)
		}
	})
}

// Several sequential readers of one segment, each with its own stream.
func TestReadaheadStreams(t *testing.T) {
	img := storetest.NewImage("streams", storetest.Solid(1, 64*miB))
	src := storetest.NewSource("good", img)
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, src)
	var wg sync.WaitGroup
	for k := range int64(4) {
		wg.Go(func() {
			for off := k * 16 * miB; off < (k+1)*16*miB; off += 128 * kiB {
				same(t, i, img.Plain, firstChunk+off, 128*kiB)
			}
		})
	}
	wg.Wait()
	if n := len(src.Requests()); n > 32 {
		t.Errorf("%d requests", n)
	}
	if src.Twice() > 0 {
		t.Errorf("%d blocks were fetched twice", src.Twice())
	}
}

// linkShare reads img sequentially through a line of 5 ms and 1 Gbit/s and
// returns which part of the line's rate was used.
func linkShare(t testing.TB, cfg store.Config, img *storetest.Image) float64 {
	src := storetest.NewSource("line", img)
	src.Link = &storetest.Link{Delay: 5 * time.Millisecond, Rate: 125_000_000}
	i := openImage(t, open(t, cfg), img, src)
	began := time.Now()
	sameAll(t, i, img.Plain, 128*kiB)
	took := time.Since(began).Seconds()
	check(t, i.Close())
	return float64(len(img.Plain)) / 125_000_000 / took
}
