package registry

import (
	"bufio"
	"context"
	"io"
	"sync"
	"time"
)

const (
	// hedgeTimes is how many times as long as a host usually takes an answer may
	// stand still before it is asked for a second time.
	hedgeTimes = 4
	// hedgeShare and hedgeBurst bound second requests: so many for each request,
	// and so many at once.
	hedgeShare = 0.05
	hedgeBurst = 4
	// usualAge is for how long a wait says what is usual; after twice that it does
	// not any more.
	usualAge = time.Minute
	// maxLost is how many races in a row a mirror may lose before it is left alone.
	// One that only is slow for once, as a proxy without the blob is, stays.
	maxLost = 3
)

// patience knows how long a host usually takes for its next byte, and decides
// after how long without one the same is asked for a second time. It has no clock
// and no lock of its own.
type patience struct {
	since        time.Time
	now, earlier time.Duration // longest wait since then, and in the time before
	spent        float64       // second requests, less what the first ones allow for
	losses       int           // races lost since a range was brought to its end
}

// lost notes a wait that ended with another host's byte, and tells whether that
// happens too often. Next time it gets longer.
func (p *patience) lost(now time.Time, d time.Duration) bool {
	p.losses++
	p.waited(now, d)
	return p.losses >= maxLost
}

// finished notes that a range was brought to its end.
func (p *patience) finished() { p.losses = 0 }

// waited notes how long a wait was.
func (p *patience) waited(now time.Time, d time.Duration) {
	if age := now.Sub(p.since); age >= usualAge {
		if p.earlier = p.now; age >= 2*usualAge {
			p.earlier = 0
		}
		p.since, p.now = now, 0
	}
	p.now = max(p.now, d)
}

// after is how long to wait before a second request, between least and a third
// of stall. A host of which nothing is known gets the latter.
func (p *patience) after(least, stall time.Duration) time.Duration {
	usual := hedgeTimes * max(p.now, p.earlier)
	if usual == 0 || usual > stall/3 {
		usual = stall / 3
	}
	return max(least, usual)
}

// request counts a request, which allows for a part of a second one.
func (p *patience) request() { p.spent = max(0, p.spent-hedgeShare) }

// spend tells whether a second request may be sent, and counts it.
func (p *patience) spend() bool {
	if p.spent > hedgeBurst-1 {
		return false
	}
	p.spent++
	return true
}

// hedge watches the waits of one rangeReader, of which there is one at a time. A
// wait that takes too long becomes a race: the rest of the piece is asked for
// again, of the next host or over another connection, and whoever brings the first
// byte goes on.
type hedge struct {
	rr    *rangeReader
	timer *time.Timer
	wg    sync.WaitGroup

	mu     sync.Mutex
	wait   *wait // nil: none; protected by mu
	closed bool  // protected by mu
}

// wait is one wait for bytes of piece from a host.
type wait struct {
	from   *Repository
	trip   *trip
	piece  piece
	began  time.Time // protected by hedge.mu
	held   bool      // it is not the host that is waited for; protected by hedge.mu
	after  time.Duration
	cancel context.CancelFunc // ends what is waited for
	second *second            // nil: none; protected by hedge.mu
}

// second is the second request of a race.
type second struct {
	from   *Repository
	trip   *trip
	off    int64
	began  time.Time // the wait
	cancel context.CancelFunc
	// body starts with a byte that is there. Once it is set, protected by
	// hedge.mu, the race is over and the first request has been cancelled.
	body  io.ReadCloser
	whole bool
}

// begin starts a wait.
func (h *hedge) begin(w *wait) {
	least := h.rr.repo.client.cfg.Hedge
	if least < 0 || h.rr.whole {
		return
	}
	w.after = h.rr.repo.client.peers.get(w.from.host).slowAfter(least, h.rr.repo.client.cfg.Stall)
	w.began = time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wait = w
	if h.timer == nil {
		h.timer = time.AfterFunc(w.after, h.slow)
		return
	}
	h.timer.Reset(w.after)
}

// hold stops the clock of the wait that the request of ctx is part of, if any, until
// resume is called: it is this node that lets the request wait, and not the host.
func hold(ctx context.Context) (resume func()) {
	t, ok := ctx.Value(tripKey{}).(*trip)
	if !ok || t.hedge == nil {
		return func() {}
	}
	return t.hedge.hold(t)
}

// hold begins the wait anew when it is resumed. That of a second request is no wait
// of the hedge as long as it has not won.
func (h *hedge) hold(t *trip) (resume func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := h.wait
	if w == nil || w.trip != t {
		return func() {}
	}
	w.held = true
	h.timer.Stop()
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		w.began, w.held = time.Now(), false
		if h.wait == w && !h.closed {
			h.timer.Reset(w.after)
		}
	}
}

// end ends the wait: with a byte, or without. When the second request has won,
// it is returned, and the first one is of no use any more.
func (h *hedge) end(got bool) *second {
	h.mu.Lock()
	w := h.wait
	h.wait = nil
	h.mu.Unlock()
	if w == nil {
		return nil
	}
	h.timer.Stop()
	if got {
		h.rr.repo.client.peers.get(w.from.host).waited(time.Since(w.began))
	}
	if w.second == nil { // it does not change without h.wait
		return nil
	}
	if w.second.body == nil {
		w.second.cancel()
		return nil
	}
	return w.second
}

// slow starts a race when the wait is allowed one.
func (h *hedge) slow() {
	h.mu.Lock()
	w := h.wait
	// The timer was that of the wait before, or goes again after a turn of a redirect.
	early := w == nil || w.held || w.second != nil || time.Since(w.began) < w.after
	h.mu.Unlock()
	if early {
		return
	}
	to := h.rr.repo.other(w.from)
	if !to.mayHedge(w.from) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.wait != w || w.held || w.second != nil || h.closed {
		return
	}
	to.client.peers.get(to.host).hedges.Add(1)
	ctx, cancel := context.WithCancel(h.rr.ctx)
	w.second = &second{from: to, trip: &trip{hedge: h, avoid: -1}, off: w.piece.off, began: w.began, cancel: cancel}
	if to.host == w.from.host {
		w.second.trip.avoid = int(w.trip.taken.Load())
	}
	h.wg.Go(func() { h.race(ctx, w, w.second) })
}

// race asks for the second time. The second request wins with its first byte, if
// the wait has not ended by then.
func (h *hedge) race(ctx context.Context, w *wait, s *second) {
	body, whole, err := s.from.ranged(withTrip(ctx, s.trip), w.piece)
	if err != nil {
		s.cancel()
		return
	}
	b := bufio.NewReaderSize(body, 4<<10)
	_, err = b.Peek(1)
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil || h.wait != w {
		s.cancel()
		_ = body.Close() // the first request goes on
		return
	}
	s.body, s.whole = &peeked{b, body}, whole
	w.cancel()
}

// peeked is a body of which some bytes have been read ahead.
type peeked struct {
	io.Reader
	io.Closer
}

// close ends what is under way.
func (h *hedge) close() {
	h.mu.Lock()
	h.closed = true
	if h.wait != nil && h.wait.second != nil {
		h.wait.second.cancel()
	}
	h.mu.Unlock()
	if h.timer != nil {
		h.timer.Stop()
	}
	h.wg.Wait()
}

// other is where the second request goes when from stands still: to the next host
// that is not down, or to the same one.
func (r *Repository) other(from *Repository) *Repository {
	hosts := r.hosts(CanPull)
	for i, one := range hosts {
		if one.host != from.host {
			continue
		}
		for _, next := range hosts[i+1:] {
			if next.last || !next.down() {
				return next
			}
		}
	}
	return from
}

// mayHedge tells whether this host may be asked for what from does not bring, and
// counts it.
func (r *Repository) mayHedge(from *Repository) bool {
	if r.client.hosts.rangeless(r.host) {
		return false
	}
	from.client.peers.get(from.host).slower()
	return r.client.peers.get(r.host).spend()
}
