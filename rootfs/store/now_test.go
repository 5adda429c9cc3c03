package store_test

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// now reads n bytes at off if they are at hand, and compares them.
func now(t *testing.T, i *store.Image, plain []byte, off, n int64) bool {
	t.Helper()
	p := bytes.Repeat([]byte{0xa5}, int(n))
	ok := i.ReadNow(p, off)
	if ok && !bytes.Equal(p, plain[off:off+n]) {
		t.Errorf("%d bytes at %d differ", n, off)
	}
	return ok
}

func idle(s *store.Store) {
	for s.Stats().FetchesInFlight > 0 {
		runtime.Gosched()
	}
}

// What is present, or waits in memory, is at hand; nothing is fetched for it.
func TestReadNow(t *testing.T) {
	img := storetest.NewImage("now", storetest.Solid(5, 8*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		src := storetest.NewSource("good", img)
		s := open(t, cfg)
		i := openImage(t, s, img, src)
		if now(t, i, img.Plain, firstChunk, 4*kiB) || len(src.Requests()) != 0 {
			t.Error("absent bytes were at hand, or were fetched")
		}
		same(t, i, img.Plain, firstChunk, 4*kiB)
		idle(s)
		if !now(t, i, img.Plain, firstChunk+4*kiB, 60*kiB) || !now(t, i, img.Plain, firstChunk+100*kiB, 200*kiB) {
			t.Error("bytes that were fetched with others were not at hand")
		}
		if again := now(t, i, img.Plain, firstChunk, 4*kiB); again != cfg.Keep {
			t.Errorf("read twice: %v", again) // without Keep a chunk goes when its reader has had it all
		}
		if now(t, i, img.Plain, firstChunk+miB-4*kiB, 8*kiB) || now(t, i, img.Plain, firstChunk-4*kiB, 8*kiB) {
			t.Error("half of it is absent, or lies in the bootstrap, and it was at hand")
		}
		if n := len(src.Requests()); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

// Reads of both kinds, in any order, give the same bytes, over chunks, zeros between
// them, and several segments.
func TestReadNowAtRandom(t *testing.T) {
	img := storetest.NewImage("now at random", storetest.Units(1, 2*miB), storetest.Files(2, 64*kiB, 5, 100_000, 0, 70_000, 4096, 300_000), storetest.Solid(3, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		s := open(t, cfg)
		i := openImage(t, s, img, storetest.NewSource("good", img))
		r := rand.New(rand.NewPCG(3, 3))
		size, hits := int64(len(img.Plain)), 0
		for range 2000 {
			off := r.Int64N(size)
			n := 1 + r.Int64N(min(size-off, 64*kiB))
			if now(t, i, img.Plain, off, n) {
				hits++
			} else {
				same(t, i, img.Plain, off, n)
			}
		}
		if hits == 0 {
			t.Error("nothing was ever at hand")
		}
		if got := s.Stats().Hits + s.Stats().Misses; got < 2000 {
			t.Errorf("%d reads were counted", got)
		}
	})
}
