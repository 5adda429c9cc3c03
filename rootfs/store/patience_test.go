package store_test

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// downFor makes the first n requests fail with err.
func downFor(n int, err error) func(storetest.Request) storetest.Fault {
	return func(r storetest.Request) storetest.Fault {
		if r.Number < n {
			return storetest.Fault{Err: err}
		}
		return storetest.Fault{}
	}
}

const always = 1 << 30

// readTime reads at off and returns how long that took.
func readTime(ctx context.Context, i *store.Image, off int64) (time.Duration, error) {
	began := time.Now()
	_, err := i.ReadAt(ctx, make([]byte, 4*kiB), off)
	return time.Since(began), err
}

// A demand read outlives an outage shorter than Patience, and no other failure
// makes it wait.
func TestPatience(t *testing.T) {
	cases := []struct {
		name     string
		fault    func(storetest.Request) storetest.Fault
		is       func(error) bool
		least    time.Duration
		most     time.Duration
		requests int
	}{
		{"twice down", downFor(2, errdefs.ErrUnavailable), func(err error) bool { return err == nil }, 300 * time.Millisecond, 301 * time.Millisecond, 3},
		{"down", downFor(always, errdefs.ErrUnavailable), errdefs.IsUnavailable, 10 * time.Second, 10001 * time.Millisecond, 10},
		{"does not have it", downFor(always, errdefs.ErrNotFound), errdefs.IsUnavailable, 0, time.Millisecond, 1},
		{"corrupt", func(storetest.Request) storetest.Fault {
			return storetest.Fault{Corrupt: func(int64) bool { return true }}
		}, errdefs.IsDataLoss, 0, time.Millisecond, 0},
		{"corrupt twice", func(r storetest.Request) storetest.Fault {
			return storetest.Fault{Corrupt: func(int64) bool { return r.Number < 2 }}
		}, func(err error) bool { return err == nil }, 0, time.Millisecond, 3},
	}
	img := storetest.NewImage("patience", storetest.Solid(1, 2*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		for _, c := range cases {
			bubble(t, c.name, func(t *testing.T) {
				cfg.Dir, cfg.Patience = t.TempDir(), 10*time.Second
				src := storetest.NewSource("only", img)
				src.Fault = c.fault
				took, err := readTime(context.Background(), openImage(t, open(t, cfg), img, src), firstChunk)
				if !c.is(err) || took < c.least || took > c.most {
					t.Errorf("read after %v: %v", took, err)
				}
				if n := len(src.Requests()); c.requests > 0 && n != c.requests {
					t.Errorf("%d requests", n)
				}
			})
		}
	})
}

// A source that does not have the segment is no reason not to wait for one that
// has it.
func TestPatienceBesideAnEmptySource(t *testing.T) {
	img := storetest.NewImage("patience beside", storetest.Solid(1, 2*miB))
	bubble(t, "twice down", func(t *testing.T) {
		empty, src := storetest.NewSource("empty", img), storetest.NewSource("down", img)
		empty.Fault, src.Fault = downFor(always, errdefs.ErrNotFound), downFor(2, errdefs.ErrUnavailable)
		s := open(t, store.Config{Dir: t.TempDir(), Patience: 10 * time.Second})
		took, err := readTime(context.Background(), openImage(t, s, img, empty, src), firstChunk)
		if err != nil || took < 300*time.Millisecond {
			t.Errorf("read after %v: %v", took, err)
		}
	})
}

// An outage ends for a reader who is interrupted, for the fetch that then nobody
// waits for, and for all when the handle is closed.
func TestPatienceEnds(t *testing.T) {
	img := storetest.NewImage("patience ends", storetest.Solid(1, 2*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		cfg.Patience = time.Hour
		bubble(t, "interrupted", func(t *testing.T) {
			cfg.Dir = t.TempDir()
			s, src := open(t, cfg), storetest.NewSource("down", img)
			src.Fault = downFor(always, errdefs.ErrUnavailable)
			i := openImage(t, s, img, src)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if took, err := readTime(ctx, i, firstChunk); !errors.Is(err, context.DeadlineExceeded) || took != time.Minute {
				t.Errorf("read after %v: %v", took, err)
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if n := s.Stats().FetchesInFlight; n > 0 {
				t.Errorf("%d fetches that nobody waits for", n)
			}
		})
		bubble(t, "closed", func(t *testing.T) {
			cfg.Dir = t.TempDir()
			src := storetest.NewSource("down", img)
			src.Fault = downFor(always, errdefs.ErrUnavailable)
			i := openImage(t, open(t, cfg), img, src)
			time.AfterFunc(time.Minute, func() { _ = i.Close() })
			if took, err := readTime(t.Context(), i, firstChunk); !errors.Is(err, os.ErrClosed) || took != time.Minute {
				t.Errorf("read after %v: %v", took, err)
			}
		})
	})
}

// A reader whose own sources work does not wait for another handle's outage,
// whether it comes before or during it, and the other one gets its bytes.
func TestPatienceOfAnotherHandle(t *testing.T) {
	img := storetest.NewImage("another handle", storetest.Solid(1, 2*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		for name, wait := range map[string]time.Duration{"before": 0, "during": 3 * time.Second} {
			bubble(t, name, func(t *testing.T) {
				cfg.Dir, cfg.Patience = t.TempDir(), time.Hour
				s, down := open(t, cfg), storetest.NewSource("down", img)
				begin := make(chan struct{})
				down.Fault = func(storetest.Request) storetest.Fault {
					return storetest.Fault{Wait: begin, Err: errdefs.ErrUnavailable}
				}
				a, b := openImage(t, s, img, down), openImage(t, s, img, storetest.NewSource("good", img))
				time.AfterFunc(time.Second, func() { close(begin) })
				var wg sync.WaitGroup
				wg.Go(func() { same(t, a, img.Plain, firstChunk, 128*kiB) })
				time.Sleep(wait)
				synctest.Wait()
				began := time.Now()
				same(t, b, img.Plain, firstChunk, 128*kiB)
				wg.Wait()
				if took := time.Since(began); took > time.Second {
					t.Errorf("it took %v", took)
				}
			})
		}
	})
}

// Readahead that a closed handle cannot start any more does not count as in
// flight.
func TestReadaheadOfClosedHandle(t *testing.T) {
	img := storetest.NewImage("ahead and closed", storetest.Solid(1, 64*miB))
	s, src := open(t, store.Config{Dir: t.TempDir(), Keep: true}), storetest.NewSource("good", img)
	i, _ := openImage(t, s, img, src), openImage(t, s, img, src) // the second keeps it open
	for off := int64(0); off <= miB+128*kiB; off += 128 * kiB {
		same(t, i, img.Plain, firstChunk+off, 128*kiB)
	}
	eventually(t, func() bool { return s.Stats().FetchesInFlight == 0 })
	requests := len(src.Requests())
	check(t, i.Close())
	for off := miB; off < 3*miB+128*kiB && i.Present() > 0; off += 128 * kiB {
		if _, err := i.ReadAt(context.Background(), make([]byte, 128*kiB), firstChunk+off); err != nil {
			break
		}
	}
	if n := s.Ahead(); n != 0 || len(src.Requests()) != requests {
		t.Errorf("%d bytes in flight", n)
	}
}
