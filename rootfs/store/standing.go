package store

import (
	"context"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// SetFlow says whom this user of the image is for: its class and sandbox. It may be
// called at any time; until it is, and with nil, the user is nobody in particular. What
// waits at that moment gets the new standing, what was fetched is charged to whom
// it was for.
func (i *Image) SetFlow(f *sched.Flow) { i.h.setFlow(f) }

// Flow is whom this user of the image is for; nil when nobody has said.
func (i *Image) Flow() *sched.Flow { return i.h.flow.Load() }

func (h *handle) setFlow(f *sched.Flow) {
	if h.flow.Swap(f) == f {
		return
	}
	h.counts.Store(h.s.stats.class(f.Class().Name))
	for k := range h.views {
		g := h.views[k].seg
		g.mu.Lock()
		for _, c := range g.claims {
			c.f.rerank()
		}
		g.mu.Unlock()
	}
}

// standing is that of what this handle wants with some urgency.
func (h *handle) standing(r sched.Rank) sched.Standing {
	return sched.Standing{Flow: h.flow.Load(), Rank: r}
}

// spare says whether the handle is of the class that yields.
func (h *handle) spare() bool { return h.s.spare(h.flow.Load()) }

// spare says whether a flow is of the class that yields, the least of several: what
// only such read goes first when the disk gets full, and is all that makes way for it.
func (s *Store) spare(f *sched.Flow) bool {
	place, n := s.cfg.Sched.Place(f)
	return n > 1 && place == n-1
}

// await is a read that waits for the chunks [from, to) of a fetch.
type await struct {
	h        *handle
	r        *read
	from, to int
}

// newFetch returns a fetch that begins with chunk i.
func (v *view) newFetch(i int, by *read, base sched.Standing) *fetch {
	return &fetch{v: v, by: by, next: i, base: base, work: sched.NewWork(base)}
}

// ctx is that of everything which is waited for on behalf of the fetch.
func (f *fetch) ctx() context.Context { return sched.With(f.v.h.ctx, f.work) }

// join says that w waits for chunk i of the fetch, which is as urgent from now on as
// whoever waits for it. A read joins for its chunks in order and at once.
// Precondition: segment.mu is held.
func (f *fetch) join(i int, w waiter) {
	if n := len(f.joined); n > 0 && f.joined[n-1].r == w.r {
		f.joined[n-1].to = i + 1
		return
	}
	f.joined = append(f.joined, await{h: w.h, r: w.r, from: i, to: i + 1})
	defer func() { w.r.late = w.r.late || f.tooLate() }()
	if s := w.h.standing(w.r.rank); first(s, f.work.Standing()) {
		f.work.Set(s)
		f.v.h.s.mem.look()
		if f.by != w.r {
			w.h.counts.Load().misses[w.r.rank].promoted.Add(1)
		}
	}
}

// part lets those who wait for chunks from stop on, which another fetch has taken
// over, wait for that. Precondition: segment.mu is held.
func (f *fetch) part(far *fetch) {
	for _, a := range f.joined {
		if a.to > f.stop {
			a.from = max(a.from, f.stop)
			far.joined = append(far.joined, a)
		}
	}
	f.rerank()
	far.rerank()
}

// advance goes on to the chunk behind next. Precondition: segment.mu is held, next
// has no claim any more.
func (f *fetch) advance() {
	f.next++
	if len(f.joined) > 0 {
		f.rerank()
	}
}

// rerank makes the fetch as urgent as the most important of those who still wait for
// it, or as it was begun. Precondition: segment.mu is held.
func (f *fetch) rerank() {
	best, live := f.base, f.joined[:0]
	for _, a := range f.joined {
		if !a.waits(f) {
			continue
		}
		live = append(live, a)
		if s := a.h.standing(a.r.rank); first(s, best) {
			best = s
		}
	}
	clear(f.joined[len(live):])
	f.joined = live
	if best != f.work.Standing() {
		f.work.Set(best)
		f.v.h.s.mem.look()
	}
}

// first says whether a fetch for which a and b wait is done as that of a. Who waits
// comes before who will: a class gets its share for what it waits for, while a rank
// may have to wait as long as there is work of those before it. It lasts until
// the chunk is there.
func first(a, b sched.Standing) bool {
	if a.Rank != b.Rank {
		return a.Rank < b.Rank
	}
	return a.Before(b)
}

// waits says whether anybody waits still for chunks of f that have not come.
func (a *await) waits(f *fetch) bool {
	return a.from < f.stop && a.to > f.next && !a.r.gone && a.r.err == nil
}

// rerank looks again at the fetches of the chunks [from, to). Precondition: mu is
// held.
func (g *segment) rerank(from, to int) {
	var last *fetch
	for i := from; i < to; i++ {
		if c := g.claims[i]; c != nil && c.f != last {
			last = c.f
			last.rerank()
		}
	}
}

// diskTurn waits until a chunk of the fetch may be written, and returns what ends
// that. When the handle is closed meanwhile, nothing is waited for.
func (f *fetch) diskTurn() (leave func()) {
	if f.v.seg.home.Load() == nil {
		return func() {}
	}
	leave, err := f.v.h.s.cfg.Sched.Disk().Enter(f.ctx())
	if err != nil {
		return func() {}
	}
	return leave
}
