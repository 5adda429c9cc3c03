package store_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

func TestFill(t *testing.T) {
	img := storetest.NewImage("fill", storetest.Units(1, 20*miB), storetest.Files(2, 4*miB, 1, 9*miB, 2))
	src := storetest.NewSource("good", img)
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	i := openImage(t, s, img, src)
	same(t, i, img.Plain, firstChunk+7*miB, 128*kiB)
	var wg sync.WaitGroup
	wg.Go(func() { check(t, i.Fill(context.Background())) })
	wg.Go(func() { check(t, i.Fill(context.Background())) })
	wg.Go(func() { sameAll(t, i, img.Plain, 128*kiB) })
	wg.Wait()
	if !i.Complete() || i.Present() != i.Size() {
		t.Errorf("%d of %d bytes present", i.Present(), i.Size())
	}
	if src.Twice() > 0 {
		t.Errorf("%d blocks were fetched twice", src.Twice())
	}
	sameAll(t, i, img.Plain, 128*kiB)
}

func TestFillInLargeRuns(t *testing.T) {
	img := storetest.NewImage("runs", storetest.Solid(1, 32*miB))
	src := storetest.NewSource("good", img)
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, src)
	check(t, i.Fill(context.Background()))
	if n := len(src.Requests()); n != 8 {
		t.Errorf("%d requests for 32 MiB", n)
	}
}

// While a demand read waits, Fill starts no fetch.
func TestFillYields(t *testing.T) {
	img := storetest.NewImage("yield", storetest.Solid(1, 64*miB))
	demand, background := make(chan struct{}), make(chan struct{})
	src := storetest.NewSource("gated", img)
	src.Fault = func(r storetest.Request) storetest.Fault {
		if r.Off >= 60*miB { // the demand read's
			return storetest.Fault{Wait: demand}
		}
		return storetest.Fault{Wait: background}
	}
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	s.SetFillPatience(time.Hour)
	i := openImage(t, s, img, src)
	filled := make(chan error)
	go func() { filled <- i.Fill(context.Background()) }()
	eventually(t, func() bool { return len(src.Requests()) == 4 }) // FillParallel
	read := make(chan struct{})
	go func() {
		defer close(read)
		same(t, i, img.Plain, firstChunk+62*miB, 128*kiB)
	}()
	eventually(t, func() bool { return s.Waiting() == 1 })
	close(background)
	eventually(t, func() bool { return i.Present() >= firstChunk+16*miB && s.Stats().BackgroundHeldBack > 0 })
	if n := len(src.Requests()); n != 5 {
		t.Errorf("%d requests while a demand read waits", n)
	}
	close(demand)
	<-read
	check(t, <-filled)
	if !i.Complete() {
		t.Error("not complete")
	}
}

// Demand that never ends slows Fill and does not stop it.
func TestFillIsPatient(t *testing.T) {
	img := storetest.NewImage("patient", storetest.Solid(1, 24*miB), storetest.Solid(2, miB))
	src := storetest.NewSource("gated", img)
	src.Fault = func(r storetest.Request) storetest.Fault {
		if r.ID == img.Index.Segments[1].ID {
			return storetest.Fault{Wait: make(chan struct{})}
		}
		return storetest.Fault{}
	}
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	s.SetFillPatience(time.Millisecond)
	i := openImage(t, s, img, src)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := i.ReadAt(ctx, make([]byte, 1), firstChunk+24*miB); !errors.Is(err, context.Canceled) {
			t.Errorf("read: %v", err)
		}
	})
	eventually(t, func() bool { return s.Waiting() == 1 })
	wg.Go(func() {
		if err := i.Fill(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("fill: %v", err)
		}
	})
	eventually(t, func() bool { return i.Present() == firstChunk+24*miB })
	cancel()
	wg.Wait()
}

func TestFillFails(t *testing.T) {
	img := storetest.NewImage("fill fails", storetest.Solid(1, 32*miB))
	src := storetest.NewSource("bad", img)
	src.Fault = func(r storetest.Request) storetest.Fault {
		return storetest.Fault{Corrupt: func(off int64) bool { return off == 17*miB }}
	}
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	i := openImage(t, s, img, src)
	if err := i.Fill(context.Background()); !errdefs.IsDataLoss(err) {
		t.Errorf("fill: %v", err)
	}
	if _, err := i.Materialize(context.Background()); !errdefs.IsDataLoss(err) {
		t.Errorf("materialize: %v", err)
	}
	if err := openImage(t, open(t, store.Config{Dir: t.TempDir()}), img, src).Fill(context.Background()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("fill without keep: %v", err)
	}
}

func TestPrefetch(t *testing.T) {
	img := storetest.NewImage("prefetch", storetest.Solid(1, 2*miB), storetest.Solid(2, 2*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		src := storetest.NewSource("good", img)
		i := openImage(t, open(t, cfg), img, src)
		check(t, i.Prefetch(context.Background(), 0, 4*kiB)) // bootstrap
		if len(src.Requests()) > 0 {
			t.Errorf("requests for the bootstrap")
		}
		check(t, i.Prefetch(context.Background(), firstChunk+miB, 2*miB))
		n := len(src.Requests())
		if src.Bytes() != 2*miB || n != 2 {
			t.Errorf("%d bytes in %d requests", src.Bytes(), n)
		}
		check(t, i.Prefetch(context.Background(), firstChunk+miB, 2*miB))
		same(t, i, img.Plain, firstChunk+miB, 2*miB)
		if len(src.Requests()) != n {
			t.Error("prefetched bytes were fetched again")
		}
		check(t, i.Prefetch(context.Background(), i.Size()-10, 1<<62))
		check(t, i.Prefetch(context.Background(), 1<<62, 1<<62))
		if err := i.Prefetch(context.Background(), -1, 1); !errdefs.IsInvalidArgument(err) {
			t.Errorf("prefetch at -1: %v", err)
		}
	})
}

// Without Keep the store's buffers stay within Config.Memory, whatever is asked
// of it, and what was dropped unread is fetched again.
func TestMemoryBound(t *testing.T) {
	img := storetest.NewImage("bound", storetest.Solid(1, 48*miB), storetest.Files(2, 4*miB, 12*miB, 5*miB+1, 900))
	for _, limit := range []int64{2 * miB, 6 * miB, 16 * miB} {
		s := open(t, store.Config{Dir: t.TempDir(), Memory: limit})
		src := storetest.NewSource("good", img)
		i := openImage(t, s, img, src)
		var most atomic.Int64
		bound := max(limit, 4*miB) // one chunk goes even when it is over the limit
		var wg sync.WaitGroup
		for r := range int64(12) {
			wg.Go(func() {
				for k := range int64(16) {
					off := (r*7_919_113 + k*5_000_011) % (i.Size() - miB)
					same(t, i, img.Plain, off, 64*kiB)
					most.Store(max(most.Load(), s.Stats().MemoryBytes))
				}
			})
		}
		wg.Wait()
		if most.Load() > bound {
			t.Errorf("%d bytes in use, the bound is %d", most.Load(), bound)
		}
		check(t, i.Close())
		if n := s.Stats().MemoryBytes; n != 0 {
			t.Errorf("%d bytes in use after Close", n)
		}
	}
}

// What one reader has had is dropped, so memory holds only what is still to be
// read, and the window is not fetched again for it.
func TestMemoryDropsWhatWasRead(t *testing.T) {
	img := storetest.NewImage("drop", storetest.Solid(1, 4*miB))
	s := open(t, store.Config{Dir: t.TempDir()})
	src := storetest.NewSource("good", img)
	i := openImage(t, s, img, src)
	sameAll(t, i, img.Plain, 128*kiB)
	if n := s.Stats().MemoryBytes; n != 0 {
		t.Errorf("%d bytes wait for nobody", n)
	}
	if src.Bytes() != 4*miB {
		t.Errorf("%d bytes fetched", src.Bytes())
	}
	n := len(src.Requests())
	sameAll(t, i, img.Plain, 128*kiB) // the page cache has lost them
	if again := len(src.Requests()) - n; again > n+1 {
		t.Errorf("%d requests for the second round, %d for the first", again, n)
	}
}

func TestMemoryRefetchesWhatItDropped(t *testing.T) {
	img := storetest.NewImage("refetch", storetest.Solid(1, miB))
	s := open(t, store.Config{Dir: t.TempDir()})
	i := openImage(t, s, img, storetest.NewSource("good", img))
	for off := int64(0); off < miB; off += 4 * kiB {
		same(t, i, img.Plain, firstChunk+off, 4*kiB)
		if off%(256*kiB) == 0 {
			s.ForgetMemory()
		}
	}
}
