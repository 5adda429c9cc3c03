package store

import (
	"context"
	"errors"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// view is a segment as one handle reads it: with the handle's sources.
type view struct {
	h    *handle
	seg  *segment
	desc *index.Segment // for sources, immutable
	read bitmap         // which extents were read; nil: nobody wants to know
}

// readAt fills p from offset off of the segment, which has all those bytes.
// Hits take no lock and allocate nothing.
func (v *view) readAt(ctx context.Context, p []byte, off int64) error {
	g := v.seg
	end := off + int64(len(p))
	v.note(off, end)
	epoch := g.epoch.Load() // before the bits
	if !g.present(off, end) {
		return v.readMissing(ctx, p, off)
	}
	if g.ahead.marked(off, end) {
		v.readAhead(ctx, off, end)
	}
	err := g.pread(p, off)
	if err != nil && !errors.Is(err, errAgain) {
		return err
	}
	if err != nil || g.epoch.Load() != epoch { // these bytes may have gone meanwhile
		return v.readMissing(ctx, p, off)
	}
	v.h.counts.Load().hit(int64(len(p)))
	return nil
}

// errAgain says that a fetch failed which the reader had only joined: it may have
// begun long before, or have used the sources of another handle. It is also the
// error of a read of present chunks that went meanwhile.
var errAgain = errors.New("fetch of another reader failed")

// maxTries bounds how often a read joins failing fetches: of its own handle
// once, of others, whose sources say nothing about its own, a few times.
const maxTries = 8

// worthAgain says whether a read that waited for f, which failed, should try
// itself.
func (w *waiter) worthAgain(f *fetch) bool {
	if w.h != f.v.h {
		return w.r.tries < maxTries
	}
	return w.r != f.by && w.r.tries == 0
}

func (v *view) readMissing(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	clear(p) // what no chunk covers is zeros
	rank := sched.RankOf(ctx)
	for tries := 0; ; tries++ {
		r, local, fetches := v.request(p, off, rank, tries)
		v.h.start(fetches)
		err := v.readLocal(p, off, r, local)
		if err == nil {
			err = v.await(ctx, r, int64(len(p)))
		} else {
			v.leave(r)
		}
		if !errors.Is(err, errAgain) {
			return err
		}
	}
}

// request finds out for every chunk of [off, off+len(p)) where it comes from: it
// is copied from memory, its number is returned in local because it is in the
// segment's file, or r waits for it. The fetches are for the caller to start.
// tries is how often the read has joined a fetch in vain.
func (v *view) request(p []byte, off int64, rank sched.Rank, tries int) (r *read, local []int, fetches []*fetch) {
	g, end := v.seg, off+int64(len(p))
	r = &read{done: make(chan struct{}), tries: tries, rank: rank}
	r.from, r.to = g.span(off, end)
	g.mu.Lock()
	defer g.mu.Unlock()
	r.epoch = g.epoch.Load()
	if g.ahead.marked(off, end) {
		fetches = v.nextWindow(off, end, rank)
	}
	for i := r.from; i < r.to; i++ {
		c := g.table.Chunks[i]
		lo, hi := max(off, c.Off), min(end, c.End())
		w := waiter{h: v.h, r: r, dst: p[lo-off : hi-off], skip: lo - c.Off}
		if g.isPresent(i) {
			local = append(local, i)
			continue
		}
		if g.takeFromMemory(i, w) {
			continue
		}
		if g.claims[i] == nil {
			fetches = append(fetches, v.claimWindow(i, end, r)...)
		} else if f := g.claims[i].f; f.by != r && v.overtakes(f, i) {
			fetches = append(fetches, f.split(i, v, r))
		}
		g.wait(i, w)
	}
	g.ahead.habit.saw(off, end-off)
	return r, local, fetches
}

// overtakes says whether a reader of chunk i, which f has claimed, does not wait
// for f: it is far away, or f waits for sources that the reader need not have.
// Precondition: g.mu is held.
func (v *view) overtakes(f *fetch, i int) bool {
	return v.seg.distance(f.next, i) > v.h.s.cfg.Window || f.paused && f.v.h != v.h
}

// readLocal reads the parts of p that lie in the given chunks, which were present
// when r was made.
func (v *view) readLocal(p []byte, off int64, r *read, chunks []int) error {
	for _, i := range chunks {
		c := v.seg.table.Chunks[i]
		lo, hi := max(off, c.Off), min(off+int64(len(p)), c.End())
		if err := v.seg.pread(p[lo-off:hi-off], lo); err != nil {
			return err
		}
	}
	if len(chunks) > 0 && v.seg.epoch.Load() != r.epoch {
		return errAgain
	}
	return nil
}

// read is one caller waiting for some chunks.
type read struct {
	done chan struct{} // closed when left is 0 or err is set
	left int           // chunks to come; protected by segment.mu, as all below
	err  error
	gone bool // the caller has left: its buffer is not to be touched

	rank     sched.Rank // immutable
	from, to int        // chunks [from, to) are those that it wants, immutable

	tries int   // how often the caller has joined a fetch in vain; immutable
	late  bool  // something is asked for as if nobody waited; set like waits
	waits bool  // something has to come; set before the lock is left for the first time
	epoch int64 // of the segment when the read looked for its chunks; set like waits
}

// waiter is one chunk that a read waits for.
type waiter struct {
	h    *handle
	r    *read
	dst  []byte // where the chunk's bytes from skip on go; empty for Fill and Prefetch
	skip int64
	kept bool // the caller wants the chunk kept, not read
}

// wait registers w on the claim of chunk i. Precondition: g.mu is held and the
// chunk is claimed.
func (g *segment) wait(i int, w waiter) {
	w.r.left++
	w.r.waits = true
	c := g.claims[i]
	c.waiters = append(c.waiters, w)
	c.f.join(i, w)
}

// settle ends w's wait for one chunk. Precondition: g.mu is held.
func (w *waiter) settle(err error) {
	r := w.r
	if r.err != nil || r.left == 0 {
		return
	}
	r.left--
	r.err = err
	if err != nil || r.left == 0 {
		close(r.done)
	}
}

// await waits until r has all its chunks, a chunk failed, or ctx ends.
func (v *view) await(ctx context.Context, r *read, n int64) error {
	counts := v.h.counts.Load()
	if !r.waits {
		counts.hit(n)
		return nil
	}
	if r.rank < sched.Background {
		v.h.s.demand.enter()
		defer v.h.s.demand.leave()
	}
	began := time.Now()
	defer func() { counts.miss(r.rank, n, time.Since(began)) }()
	return v.sleep(ctx, r)
}

func (v *view) sleep(ctx context.Context, r *read) error {
	var late <-chan time.Time
	if r.late {
		t := time.NewTimer(hurryAfter)
		defer t.Stop()
		late = t.C
	}
	for {
		select {
		case <-r.done:
			v.leave(r)
			return r.err
		case <-ctx.Done():
			v.leave(r)
			return ctx.Err()
		case <-late:
			v.hurry(r)
		}
	}
}

// leave makes sure that no fetch writes to r's buffer any more, and that none is more
// urgent because of r.
func (v *view) leave(r *read) {
	v.seg.mu.Lock()
	defer v.seg.mu.Unlock()
	r.gone = true
	if r.left > 0 {
		v.seg.rerank(r.from, r.to)
	}
}
