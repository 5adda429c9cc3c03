package store

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// handle is what one user of an image or a segment brings along: sources and a
// lifetime. The segments behind it are shared with other handles.
type handle struct {
	s       *Store
	what    string    // for errors: "image sha256:…"
	sources []*source // immutable, in the order of preference
	ctx     context.Context
	cancel  context.CancelFunc
	views   []view                        // one for each segment, by rising offset
	drop    func()                        // gives back what was opened; called with Store.mu held
	flow    atomic.Pointer[sched.Flow]    // whom it is for; nil: nobody in particular
	counts  atomic.Pointer[classCounters] // of the flow's class

	recording atomic.Pointer[Recording] // nil: nobody wants to know what is read

	mu     sync.Mutex
	closed bool           // protected by mu; no fetch starts any more
	wg     sync.WaitGroup // running fetches
	once   sync.Once
}

// newHandle registers a handle. Precondition: Store.mu is held.
func (s *Store) newHandle(what string, sources []Source) *handle {
	h := &handle{s: s, what: what}
	h.counts.Store(s.stats.class(""))
	h.ctx, h.cancel = context.WithCancel(s.ctx)
	for _, src := range sources {
		h.sources = append(h.sources, &source{Source: src, stats: s.stats.source(src.Name()), log: s.log})
	}
	s.handles[h] = true
	return h
}

// start runs fetches in the background; after close their readers get an error.
func (h *handle) start(fetches []*fetch) {
	for _, f := range fetches {
		h.mu.Lock()
		closed := h.closed
		if !closed {
			h.s.stats.fetches.Add(1)
			h.wg.Go(f.run)
		}
		h.mu.Unlock()
		if closed {
			f.abandon(h.errClosed())
			h.s.stats.ahead.Add(-f.ahead)
		}
	}
}

func (h *handle) errClosed() error { return fmt.Errorf("%s: %w", h.what, os.ErrClosed) }

// close ends the fetches, waits for them, makes durable what they kept and gives
// the segments back.
func (h *handle) close() {
	h.once.Do(func() {
		h.mu.Lock()
		h.closed = true
		h.mu.Unlock()
		h.cancel()
		h.wg.Wait()
		h.noteUse()
		for i := range h.views {
			h.views[i].seg.flush()
		}
		h.s.mu.Lock()
		defer h.s.mu.Unlock()
		delete(h.s.handles, h)
		h.drop()
	})
}
