package store_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

func TestReadWhole(t *testing.T) {
	images := map[string]*storetest.Image{
		"units":    storetest.NewImage("units", storetest.Units(1, 5*miB+12*kiB), storetest.Units(2, 4*kiB)),
		"files":    storetest.NewImage("files", storetest.Files(3, 4*miB, 1, 4095, 4096, 4097, 70_000, 9*miB+17, 3, 5)),
		"one hole": storetest.NewImage("hole", storetest.Segment{Table: &index.Table{Size: miB}, Plain: make([]byte, miB)}),
		"empty":    storetest.NewImage("empty"),
	}
	eachMode(t, func(t *testing.T, cfg store.Config) {
		s := open(t, cfg)
		for name, img := range images {
			for _, step := range []int64{4 * kiB, 128 * kiB, 100_003, 64 * miB} {
				src := storetest.NewSource("good", img)
				i := openImage(t, s, img, src)
				sameAll(t, i, img.Plain, step)
				if i.Size() != int64(len(img.Plain)) || cfg.Keep != i.Complete() && len(img.Index.Segments) > 0 && name != "one hole" {
					t.Errorf("%s: %d bytes, complete is %v", name, i.Size(), i.Complete())
				}
				if step <= 128*kiB && src.Twice() > 0 {
					t.Errorf("%s in steps of %d: %d blocks were fetched twice", name, step, src.Twice())
				}
				check(t, i.Close())
				if cfg.Keep {
					check(t, s.Remove(i.Manifest()))
				}
			}
		}
	})
}

func TestReadEdges(t *testing.T) {
	img := storetest.NewImage("edges", storetest.Units(1, miB))
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, storetest.NewSource("good", img))
	p := make([]byte, 10)
	if n, err := i.ReadAt(context.Background(), p, i.Size()); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if n, err := i.ReadAt(context.Background(), p, i.Size()-3); n != 3 || !errors.Is(err, io.EOF) {
		t.Errorf("over the end: %d, %v", n, err)
	}
	if n, err := i.ReadAt(context.Background(), p, i.Size()+1<<40); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("far behind the end: %d, %v", n, err)
	}
	if _, err := i.ReadAt(context.Background(), p, -1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("before the start: %v", err)
	}
	if n, err := i.ReadAt(context.Background(), nil, 0); n != 0 || err != nil {
		t.Errorf("nothing: %d, %v", n, err)
	}
}

// Many readers with overlapping ranges: all get the right bytes, and every byte
// is fetched once.
func TestConcurrentReaders(t *testing.T) {
	img := storetest.NewImage("crowd", storetest.Units(1, 12*miB), storetest.Files(2, 4*miB, 100, 5*miB, 3000, 20, 700*kiB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		cfg.Memory = 128 * miB // no eviction
		s := open(t, cfg)
		src := storetest.NewSource("good", img)
		i := openImage(t, s, img, src)
		var wg sync.WaitGroup
		for r := range 16 {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(r), 1))
				for range 60 {
					n := 1 + rnd.Int64N(300*kiB)
					same(t, i, img.Plain, rnd.Int64N(i.Size()), n)
				}
			})
		}
		wg.Wait()
		if cfg.Keep && src.Twice() > 0 {
			t.Errorf("%d blocks were fetched twice", src.Twice())
		}
	})
}

// Readers of the same bytes at the same moment share one fetch, in both modes.
func TestOneFetchForAll(t *testing.T) {
	img := storetest.NewImage("shared fetch", storetest.Solid(1, 2*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		s := open(t, cfg)
		gate := make(chan struct{})
		src := storetest.NewSource("gated", img)
		src.Fault = func(storetest.Request) storetest.Fault { return storetest.Fault{Wait: gate} }
		i := openImage(t, s, img, src)
		var wg sync.WaitGroup
		for k := range int64(20) {
			wg.Go(func() { same(t, i, img.Plain, firstChunk+k*40*kiB, 128*kiB) })
		}
		eventually(t, func() bool { return s.Waiting() == 20 })
		close(gate)
		wg.Wait()
		if src.Twice() > 0 || len(src.Requests()) > 4 { // a window begins at one of four places
			t.Errorf("%d requests, %d blocks twice", len(src.Requests()), src.Twice())
		}
	})
}

// A reader gets its chunk when it has arrived, not when the run has.
func TestWokenByOwnChunk(t *testing.T) {
	img := storetest.NewImage("early", storetest.Solid(1, 2*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		src := storetest.NewSource("halting", img)
		hold := make(chan struct{})
		src.Fault = func(storetest.Request) storetest.Fault { return storetest.Fault{HoldAt: 128 * kiB, Hold: hold} }
		i := openImage(t, open(t, cfg), img, src)
		same(t, i, img.Plain, firstChunk, 128*kiB)
		close(hold)
		same(t, i, img.Plain, firstChunk, miB)
	})
}

// A cancelled reader returns at once; the fetch goes on for the others.
func TestCancelledReader(t *testing.T) {
	img := storetest.NewImage("cancel", storetest.Solid(1, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		s := open(t, cfg)
		gate := make(chan struct{})
		src := storetest.NewSource("gated", img)
		src.Fault = func(storetest.Request) storetest.Fault { return storetest.Fault{Wait: gate} }
		i := openImage(t, s, img, src)
		ctx, cancel := context.WithCancel(context.Background())
		first := make(chan error)
		p := make([]byte, 128*kiB)
		go func() {
			_, err := i.ReadAt(ctx, p, firstChunk)
			first <- err
		}()
		eventually(t, func() bool { return len(src.Requests()) == 1 })
		second := make(chan struct{})
		go func() {
			defer close(second)
			same(t, i, img.Plain, firstChunk, 128*kiB)
		}()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled reader got %v", err)
		}
		clear(p) // the race detector sees who else writes here
		close(gate)
		<-second
		if n := len(src.Requests()); n != 1 {
			t.Errorf("%d requests", n)
		}
		if _, err := i.ReadAt(ctx, p, firstChunk); cfg.Keep && err != nil {
			t.Errorf("hit with a cancelled context: %v", err)
		}
	})
}

// A chunk far ahead of where a long fetch has got to is fetched on its own.
func TestSplitLongFetch(t *testing.T) {
	img := storetest.NewImage("long", storetest.Solid(1, 32*miB))
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	hold := make(chan struct{})
	src := storetest.NewSource("first request hangs", img)
	src.Fault = func(r storetest.Request) storetest.Fault {
		if r.Number == 0 {
			return storetest.Fault{HoldAt: 64 * kiB, Hold: hold}
		}
		return storetest.Fault{}
	}
	i := openImage(t, s, img, src)
	done := make(chan error)
	go func() { done <- i.Prefetch(context.Background(), firstChunk, 8*miB) }()
	eventually(t, func() bool { return len(src.Requests()) == 1 })
	same(t, i, img.Plain, firstChunk+4*miB, 128*kiB)
	close(hold)
	check(t, <-done)
	if src.Twice() > 0 {
		t.Errorf("%d blocks were fetched twice", src.Twice())
	}
	same(t, i, img.Plain, firstChunk, 8*miB)
}

// The hit path takes no memory.
func TestHitAllocates(t *testing.T) {
	img := storetest.NewImage("hits", storetest.Units(1, 4*miB), storetest.Files(2, 4*miB, 100, 200, 300, miB))
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, storetest.NewSource("good", img))
	check(t, i.Fill(context.Background()))
	p := make([]byte, 128*kiB)
	ctx := context.Background()
	for _, off := range []int64{0, firstChunk, firstChunk + miB, firstChunk + 4*miB - 64*kiB, firstChunk + 4*miB + 8*kiB} {
		n := testing.AllocsPerRun(100, func() {
			if _, err := i.ReadAt(ctx, p, off); err != nil {
				t.Error(err)
			}
		})
		if n != 0 {
			t.Errorf("read at %d: %v allocations", off, n)
		}
	}
}

func TestStats(t *testing.T) {
	img := storetest.NewImage("stats", storetest.Solid(1, miB))
	src := storetest.NewSource("good", img)
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	i := openImage(t, s, img, src)
	same(t, i, img.Plain, firstChunk, 128*kiB)
	check(t, i.Fill(context.Background()))
	same(t, i, img.Plain, firstChunk, 128*kiB)
	st := s.Stats()
	if st.Misses != 1 || st.MissBytes != 128*kiB || st.Hits != 1 || st.HitBytes != 128*kiB || st.Wait <= 0 {
		t.Errorf("%+v", st)
	}
	want := store.SourceStats{Name: "good", Requests: int64(len(src.Requests())), Bytes: miB}
	if len(st.Sources) != 1 || st.Sources[0] != want {
		t.Errorf("sources %+v, want %+v", st.Sources, want)
	}
	if i.Present() != i.Size() {
		t.Errorf("%d of %d bytes present", i.Present(), i.Size())
	}
}

// Closing a handle ends its reads and leaves those of other handles alone.
func TestCloseWhileReading(t *testing.T) {
	img := storetest.NewImage("close", storetest.Solid(1, 4*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		cfg.Stall = time.Hour
		s := open(t, cfg)
		gate := make(chan struct{})
		hung := storetest.NewSource("hung", img)
		hung.Fault = func(storetest.Request) storetest.Fault { return storetest.Fault{Wait: gate} }
		a := openImage(t, s, img, hung)
		b := openImage(t, s, img, storetest.NewSource("good", img))
		errs := make(chan error)
		go func() {
			_, err := a.ReadAt(context.Background(), make([]byte, 4*kiB), firstChunk)
			errs <- err
		}()
		eventually(t, func() bool { return len(hung.Requests()) == 1 })
		other := make(chan struct{})
		go func() {
			defer close(other)
			same(t, b, img.Plain, firstChunk, 4*kiB) // waits for the hung fetch
		}()
		eventually(t, func() bool { return s.Waiting() == 2 })
		check(t, a.Close())
		if err := <-errs; err == nil {
			t.Error("read through a closed handle succeeded")
		}
		<-other
		if _, err := a.ReadAt(context.Background(), make([]byte, 4*kiB), firstChunk+3*miB); !errors.Is(err, os.ErrClosed) {
			t.Errorf("read after Close: %v", err)
		}
	})
}

// A mistake in the arithmetic of windows shows in an odd table.
func TestOddTables(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	var sizes []int64
	for range 300 {
		sizes = append(sizes, rnd.Int64N(1<<rnd.Int64N(22)))
	}
	img := storetest.NewImage("odd", storetest.Files(9, 300_001, sizes...))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		cfg.Window, cfg.MaxWindow = 100_000, 777_777
		i := openImage(t, open(t, cfg), img, storetest.NewSource("good", img))
		for range 400 {
			same(t, i, img.Plain, rnd.Int64N(i.Size()), 1+rnd.Int64N(200_000))
		}
		sameAll(t, i, img.Plain, 131_072)
	})
}

// eventually waits for something that is certain to happen.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	for range 20_000 {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("it did not happen")
}
