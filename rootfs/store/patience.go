package store

import "time"

// outage is a time in which a fetch finds no source that works.
type outage struct {
	at    int // chunk that the fetch is at
	since time.Time
	delay time.Duration // before the sources are asked again; 0: there is no outage
}

const (
	firstRetry = 100 * time.Millisecond // doubles with every attempt
	maxRetry   = 2 * time.Second
)

// endure waits a little after an attempt of a demand fetch failed because a
// source does not work, and says whether to try again: Config.Patience has not passed
// since the fetch last got on, and a reader still waits. It returns at once when
// the handle is closed, which the next attempt reports.
func (f *fetch) endure(o *outage) bool {
	if !f.down || f.by == nil {
		return false
	}
	if o.delay == 0 || o.at != f.next {
		*o = outage{at: f.next, since: time.Now(), delay: firstRetry}
	}
	left := f.v.h.s.cfg.Patience - time.Since(o.since)
	if left <= 0 || !f.pause() {
		return false
	}
	timer := time.NewTimer(min(o.delay, left))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-f.v.h.ctx.Done():
	}
	o.delay = min(2*o.delay, maxRetry)
	return f.resume()
}

// pause lets go of the readers through other handles, whose sources may work,
// and says whether one of this handle waits. Those that come while the fetch is
// paused take its chunks over.
func (f *fetch) pause() bool {
	g := f.v.seg
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := f.next; i < f.stop; i++ {
		c := g.claims[i]
		stay := c.waiters[:0]
		for _, w := range c.waiters {
			if w.h != f.v.h && w.worthAgain(f) {
				w.settle(errAgain)
			} else {
				stay = append(stay, w)
			}
		}
		clear(c.waiters[len(stay):])
		c.waiters = stay
	}
	f.rerank()
	f.paused = f.awaited()
	return f.paused
}

// resume ends a pause and says whether a reader waits still.
func (f *fetch) resume() bool {
	f.v.seg.mu.Lock()
	defer f.v.seg.mu.Unlock()
	f.paused = false
	return f.awaited()
}

// awaited says whether a reader waits for a chunk of the run; Fill and Prefetch
// are none. Precondition: segment.mu is held.
func (f *fetch) awaited() bool {
	for i := f.next; i < f.stop; i++ {
		for _, w := range f.v.seg.claims[i].waiters {
			if len(w.dst) > 0 && !w.r.gone && w.r.err == nil {
				return true
			}
		}
	}
	return false
}
