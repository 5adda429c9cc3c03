package store_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// Sources that fail in every way, before a good one: the reader gets the right
// bytes and the counters say who was wrong.
func TestSourceFails(t *testing.T) {
	img := storetest.NewImage("failover", storetest.Units(1, 3*miB), storetest.Files(2, 4*miB, 300_000, 17, 900_000))
	faults := map[string]func(r storetest.Request) storetest.Fault{
		"unavailable": func(storetest.Request) storetest.Fault {
			return storetest.Fault{Err: fmt.Errorf("line is down: %w", errdefs.ErrUnavailable)}
		},
		"not found": func(storetest.Request) storetest.Fault { return storetest.Fault{Err: errdefs.ErrNotFound} },
		"corrupt": func(storetest.Request) storetest.Fault {
			return storetest.Fault{Corrupt: func(off int64) bool { return off%99_991 == 0 }}
		},
		"all zeros are wrong": func(storetest.Request) storetest.Fault {
			return storetest.Fault{Corrupt: func(int64) bool { return true }}
		},
		"empty body": func(r storetest.Request) storetest.Fault { return storetest.Fault{EndAt: max(r.Off, 1)} },
		"short":      func(r storetest.Request) storetest.Fault { return storetest.Fault{EndAt: r.Off + 100_000} },
		"stalls":     func(r storetest.Request) storetest.Fault { return storetest.Fault{StallAt: r.Off + 70_000} },
		"never answers": func(storetest.Request) storetest.Fault {
			return storetest.Fault{Wait: make(chan struct{})}
		},
	}
	eachMode(t, func(t *testing.T, cfg store.Config) {
		for name, fault := range faults {
			bubble(t, name, func(t *testing.T) {
				cfg.Dir = t.TempDir()
				s := open(t, cfg)
				bad, good := storetest.NewSource("bad", img), storetest.NewSource("good", img)
				bad.Fault = fault
				i := openImage(t, s, img, bad, good)
				sameAll(t, i, img.Plain, 128*kiB)
				st := s.Stats()
				if st.Sources[0].Errors == 0 || st.Sources[1].Errors != 0 {
					t.Errorf("sources %+v", st.Sources)
				}
				if wrong := name == "corrupt" || name == "all zeros are wrong"; wrong != (st.VerifyFailures > 0) {
					t.Errorf("%d verify failures", st.VerifyFailures)
				}
			})
		}
	})
}

// bubble runs a subtest whose clock moves on when everyone waits, so that
// Config.Stall costs no time and no busy machine looks like a stalled source.
func bubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// With no good source a read fails with a class and never gives zeros; when the
// sources have recovered, it succeeds.
func TestAllSourcesFail(t *testing.T) {
	img := storetest.NewImage("no source", storetest.Solid(1, 2*miB))
	cases := []struct {
		name  string
		fault storetest.Fault
		is    func(error) bool
	}{
		{"corrupt", storetest.Fault{Corrupt: func(int64) bool { return true }}, errdefs.IsDataLoss},
		{"down", storetest.Fault{Err: errdefs.ErrPermissionDenied}, errdefs.IsUnavailable},
		{"does not have it", storetest.Fault{Err: errdefs.ErrNotFound}, errdefs.IsUnavailable},
		{"short", storetest.Fault{EndAt: 1}, errdefs.IsUnavailable},
		{"stalled", storetest.Fault{StallAt: 1}, errdefs.IsUnavailable},
	}
	eachMode(t, func(t *testing.T, cfg store.Config) {
		for _, c := range cases {
			bubble(t, c.name, func(t *testing.T) {
				cfg.Dir = t.TempDir()
				var mu sync.Mutex
				well := false
				fault := func(storetest.Request) storetest.Fault {
					mu.Lock()
					defer mu.Unlock()
					if well {
						return storetest.Fault{}
					}
					return c.fault
				}
				a, b := storetest.NewSource("a", img), storetest.NewSource("b", img)
				a.Fault, b.Fault = fault, fault
				s := open(t, cfg)
				i := openImage(t, s, img, a, b)
				_, err := i.ReadAt(context.Background(), make([]byte, 128*kiB), firstChunk)
				if !c.is(err) || errdefs.IsNotFound(err) {
					t.Fatalf("read: %v", err)
				}
				if !strings.Contains(err.Error(), "a:") || !strings.Contains(err.Error(), "b:") {
					t.Errorf("error does not name the sources: %v", err)
				}
				eventually(t, func() bool { return s.Stats().FetchesInFlight == 0 })
				mu.Lock()
				well = true
				mu.Unlock()
				sameAll(t, i, img.Plain, 128*kiB)
			})
		}
	})
}

// A single source that breaks off again and again is asked for the rest.
func TestSourceBreaksOff(t *testing.T) {
	img := storetest.NewImage("breaks off", storetest.Solid(1, 2*miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		src := storetest.NewSource("short", img)
		src.Fault = func(r storetest.Request) storetest.Fault { return storetest.Fault{EndAt: r.Off + 200_000} }
		sameAll(t, openImage(t, open(t, cfg), img, src), img.Plain, 128*kiB)
	})
}

func TestNoSource(t *testing.T) {
	img := storetest.NewImage("none", storetest.Solid(1, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		i := openImage(t, open(t, cfg), img)
		if _, err := i.ReadAt(context.Background(), make([]byte, 1), firstChunk); !errdefs.IsUnavailable(err) {
			t.Errorf("read: %v", err)
		}
	})
}

// One bad chunk does not cost its neighbours, even when no source has it right.
func TestOneBadChunk(t *testing.T) {
	img := storetest.NewImage("one bad", storetest.Solid(1, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		src := storetest.NewSource("bad at 200000", img)
		src.Fault = func(storetest.Request) storetest.Fault {
			return storetest.Fault{Corrupt: func(off int64) bool { return off == 200_000 }}
		}
		s := open(t, cfg)
		i := openImage(t, s, img, src)
		same(t, i, img.Plain, firstChunk, 4*kiB) // its window has them all
		eventually(t, func() bool { return s.Stats().FetchesInFlight == 0 })
		if cfg.Keep && i.Present() != i.Size()-64*kiB {
			t.Errorf("%d of %d bytes present", i.Present(), i.Size())
		}
		var wg sync.WaitGroup
		for k := range int64(8) {
			if k == 1 { // has offset 200000
				continue
			}
			wg.Go(func() { same(t, i, img.Plain, firstChunk+k*128*kiB, 128*kiB) })
		}
		wg.Wait()
		same(t, i, img.Plain, firstChunk+128*kiB, 64*kiB)
		if _, err := i.ReadAt(context.Background(), make([]byte, 4*kiB), firstChunk+200*kiB); !errdefs.IsDataLoss(err) {
			t.Errorf("read of the bad chunk: %v", err)
		}
	})
}

// Sources whose bad chunks differ make up one good source.
func TestSourcesComplement(t *testing.T) {
	img := storetest.NewImage("complement", storetest.Solid(1, 4*miB))
	bad := func(rest int64) func(storetest.Request) storetest.Fault {
		return func(storetest.Request) storetest.Fault {
			return storetest.Fault{Corrupt: func(off int64) bool { return off/(64*kiB)%2 == rest }}
		}
	}
	eachMode(t, func(t *testing.T, cfg store.Config) {
		even, odd := storetest.NewSource("even", img), storetest.NewSource("odd", img)
		even.Fault, odd.Fault = bad(1), bad(0)
		i := openImage(t, open(t, cfg), img, even, odd)
		sameAll(t, i, img.Plain, 128*kiB)
	})
}

// A source that stalls is asked last for a while: it costs one read, not all.
func TestStalledSourceIsAskedLast(t *testing.T) {
	synctest.Test(t, stalledSourceIsAskedLast)
}

func stalledSourceIsAskedLast(t *testing.T) {
	img := storetest.NewImage("suspect", storetest.Solid(1, 16*miB))
	hung, good := storetest.NewSource("hung", img), storetest.NewSource("good", img)
	hung.Fault = func(r storetest.Request) storetest.Fault { return storetest.Fault{StallAt: max(r.Off, 1)} }
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, hung, good)
	for off := int64(0); off < 8*miB; off += 2 * miB {
		same(t, i, img.Plain, firstChunk+off, 4*kiB)
	}
	if n := len(hung.Requests()); n != 1 {
		t.Errorf("the hung source was asked %d times", n)
	}
	time.Sleep(time.Minute)
	same(t, i, img.Plain, firstChunk+8*miB, 4*kiB)
	if n := len(hung.Requests()); n != 2 {
		t.Errorf("the hung source was asked %d times, one of them a minute later", n)
	}
}

// A reader who joined a fetch that then fails tries once itself.
func TestJoinedFetchFails(t *testing.T) {
	img := storetest.NewImage("joined", storetest.Solid(1, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		s := open(t, cfg)
		gate := make(chan struct{})
		src := storetest.NewSource("fails first", img)
		src.Fault = func(r storetest.Request) storetest.Fault {
			if r.Number == 0 {
				return storetest.Fault{Wait: gate, Err: errdefs.ErrUnavailable}
			}
			return storetest.Fault{}
		}
		i := openImage(t, s, img, src)
		errs := make(chan error)
		go func() { errs <- i.Prefetch(context.Background(), firstChunk, miB) }()
		eventually(t, func() bool { return len(src.Requests()) == 1 })
		done := make(chan struct{})
		go func() {
			defer close(done)
			same(t, i, img.Plain, firstChunk+300*kiB, 128*kiB)
		}()
		eventually(t, func() bool { return s.Waiting() == 1 })
		close(gate)
		if err := <-errs; !errdefs.IsUnavailable(err) {
			t.Errorf("prefetch: %v", err)
		}
		<-done
	})
}

// The sources of another handle that waits for the same chunk are tried too.
func TestOtherHandlesSources(t *testing.T) {
	img := storetest.NewImage("two handles", storetest.Solid(1, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		s := open(t, cfg)
		gate := make(chan struct{})
		bad := storetest.NewSource("bad", img)
		bad.Fault = func(storetest.Request) storetest.Fault {
			return storetest.Fault{Wait: gate, Err: errdefs.ErrUnavailable}
		}
		a, b := openImage(t, s, img, bad), openImage(t, s, img, storetest.NewSource("good", img))
		errs := make(chan error)
		go func() {
			_, err := a.ReadAt(context.Background(), make([]byte, 1), firstChunk)
			errs <- err
		}()
		eventually(t, func() bool { return s.Waiting() == 1 })
		done := make(chan struct{})
		go func() {
			defer close(done)
			same(t, b, img.Plain, firstChunk, 100)
		}()
		eventually(t, func() bool { return s.Waiting() == 2 })
		close(gate)
		if err := <-errs; !errdefs.IsUnavailable(err) {
			t.Errorf("handle with the bad source: %v", err)
		}
		<-done
	})
}

// A hostile body that never ends, gives bytes with its error, or returns nothing
// without an error.
func TestOddBodies(t *testing.T) {
	img := storetest.NewImage("odd bodies", storetest.Solid(1, 128*kiB))
	bodies := map[string]func(off, n int64) io.Reader{
		"endless": func(off, n int64) io.Reader {
			return io.MultiReader(bytes.NewReader(img.Plain[firstChunk+off:]), zeros{})
		},
		"one byte at a time": func(off, n int64) io.Reader {
			return oneByte{bytes.NewReader(img.Plain[firstChunk+off : firstChunk+off+n])}
		},
		"all with EOF": func(off, n int64) io.Reader {
			return &withEOF{img.Plain[firstChunk+off : firstChunk+off+n]}
		},
	}
	eachMode(t, func(t *testing.T, cfg store.Config) {
		for name, body := range bodies {
			t.Run(name, func(t *testing.T) {
				cfg.Dir = t.TempDir()
				i := openImage(t, open(t, cfg), img, bodySource(body))
				sameAll(t, i, img.Plain, 128*kiB)
			})
		}
	})
}

type bodySource func(off, n int64) io.Reader

func (b bodySource) Name() string { return "odd" }

func (b bodySource) Fetch(_ context.Context, _ *index.Segment, off, n int64) (io.ReadCloser, error) {
	return io.NopCloser(b(off, n)), nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

type withEOF struct{ rest []byte }

func (w *withEOF) Read(p []byte) (int, error) {
	n := copy(p, w.rest)
	if w.rest = w.rest[n:]; len(w.rest) == 0 {
		return n, io.EOF
	}
	return n, nil
}

// hostsSource is a source with several hosts: each gives wrong bytes, and is not
// asked again once it is blamed; the last one is.
type hostsSource struct {
	*storetest.Source
	wrong  int // hosts that give wrong bytes
	always bool
	blamed atomic.Int64
}

type hostsBody struct {
	io.ReadCloser
	s *hostsSource
}

func (s *hostsSource) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	body, err := s.Source.Fetch(ctx, seg, off, n)
	return hostsBody{body, s}, err
}

// Blame implements store.Blamer.
func (b hostsBody) Blame(err error) bool {
	if !errdefs.IsDataLoss(err) {
		panic(err)
	}
	return int(b.s.blamed.Add(1)) < b.s.wrong
}

// TestBlame reads through sources of which some hosts give wrong bytes.
func TestBlame(t *testing.T) {
	for _, c := range []struct {
		name     string
		wrong    int
		always   bool
		ok       bool
		requests int
	}{
		{"no host is wrong", 0, false, true, 1},
		{"one host, once", 1, false, true, 2},
		{"three hosts", 3, false, true, 4},
		{"one host, always", 1, true, false, 3},
		{"endlessly many", 1000, true, false, 3 * 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := storetest.NewImage("image", storetest.Solid(1, 4*index.UnitSize))
			src := &hostsSource{Source: storetest.NewSource("hosts", img), wrong: c.wrong, always: c.always}
			src.Fault = func(storetest.Request) storetest.Fault {
				bad := c.always || int(src.blamed.Load()) < c.wrong
				return storetest.Fault{Corrupt: func(off int64) bool { return bad && off == index.UnitSize+7 }}
			}
			s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
			h := openImage(t, s, img, src)
			p := make([]byte, 100)
			off := img.Index.Segments[0].Off + index.UnitSize
			_, err := h.ReadAt(t.Context(), p, off)
			if (err == nil) != c.ok || c.ok && !bytes.Equal(p, img.Plain[off:off+100]) || !c.ok && !errdefs.IsDataLoss(err) {
				t.Errorf("read: %v", err)
			}
			asked := 0
			for _, r := range src.Requests() {
				if r.Off <= index.UnitSize && r.Off+r.N > index.UnitSize {
					asked++
				}
			}
			if asked != c.requests || int(src.blamed.Load()) != c.requests-1 && c.ok {
				t.Errorf("asked %d times and blamed %d times, want %d requests", asked, src.blamed.Load(), c.requests)
			}
		})
	}
}
