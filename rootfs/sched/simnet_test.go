package sched

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// simNet is a path that sends a number of bytes a second to some connections, fairly,
// as long as their buffers take more. It lives in a bubble of synctest.
type simNet struct {
	mu       sync.Mutex
	rate     float64
	conns    map[*simConn]bool
	received int64
}

type simConn struct {
	net    *simNet
	room   int64 // of its buffer
	unread int64
	more   chan struct{} // there is something to read
}

const simTick = 2 * time.Millisecond

func newSimNet(ctx context.Context, rate float64) *simNet {
	n := &simNet{rate: rate, conns: map[*simConn]bool{}}
	go func() {
		for ctx.Err() == nil {
			time.Sleep(simTick)
			n.tick()
		}
	}()
	return n
}

func (n *simNet) setRate(rate float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rate = rate
}

// tick sends what fits into a tick.
func (n *simNet) tick() {
	n.mu.Lock()
	defer n.mu.Unlock()
	budget := int64(n.rate * simTick.Seconds())
	for budget > 0 {
		var open []*simConn
		for c := range n.conns {
			if c.unread < c.room {
				open = append(open, c)
			}
		}
		if len(open) == 0 {
			return
		}
		part := budget/int64(len(open)) + 1
		for _, c := range open {
			d := min(part, c.room-c.unread, budget)
			c.unread += d
			budget -= d
			n.received += d
			select {
			case c.more <- struct{}{}:
			default:
			}
		}
	}
}

func (n *simNet) dial(room int64) *simConn {
	c := &simConn{net: n, room: room, more: make(chan struct{}, 1)}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns[c] = true
	return c
}

func (c *simConn) close() {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	delete(c.net.conns, c)
}

func (c *simConn) read(ctx context.Context, most int) int {
	for {
		c.net.mu.Lock()
		n := min(c.unread, int64(most))
		c.unread -= n
		c.net.mu.Unlock()
		if n > 0 {
			return int(n)
		}
		select {
		case <-c.more:
		case <-ctx.Done():
			return 0
		}
	}
}

// sample is what a kernel would say.
func (n *simNet) sample(int, float64) wireSample {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := wireSample{known: true, received: n.received}
	for c := range n.conns {
		s.unread += c.unread
	}
	return s
}

// download reads over one connection until ctx ends, think taking its time after each
// read, and counts in got.
func (n *simNet) download(ctx context.Context, u *Upstream, s Standing, think func(), got func(int)) {
	ctx = With(ctx, NewWork(s))
	end, err := u.Begin(ctx)
	if err != nil {
		return
	}
	defer end()
	c := n.dial(128 << 10)
	defer c.close()
	for {
		g, err := u.Receive(ctx, 64<<10)
		if err != nil {
			return
		}
		k := c.read(ctx, g.N)
		u.Received(g, k)
		got(k)
		think()
	}
}

// counter counts bytes of several goroutines.
type counter struct {
	mu sync.Mutex
	n  int64
}

func (c *counter) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += int64(n)
}

// take is what was counted since the latest take.
func (c *counter) take() float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.n
	c.n = 0
	return float64(n)
}

// simulate runs f in a bubble with a host behind a path of some rate.
func simulate(t *testing.T, rate float64, wires bool, f func(ctx context.Context, s *Scheduler, u *Upstream, n *simNet)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer func() { cancel(); time.Sleep(time.Second) }()
		s := mustNew(t, Config{})
		u := s.Upstream("h")
		n := newSimNet(ctx, rate)
		if wires {
			u.rate.look = n.sample
		}
		f(ctx, s, u, n)
	})
}

// limit is what the queue hands out; 0: no bound.
func (q *rateQueue) limit() float64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.pace.rate
}

// measured is what the queue takes for the capacity.
func (q *rateQueue) measured() float64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.est.capacity
}

func noThinking() {}

func TestEstimate(t *testing.T) {
	for name, wires := range map[string]bool{"kernel": true, "reads": false} {
		t.Run(name, func(t *testing.T) {
			simulate(t, 8e6, wires, func(ctx context.Context, s *Scheduler, u *Upstream, n *simNet) {
				var got counter
				for range 4 {
					go n.download(ctx, u, Standing{s.Flow("batch", "1"), Demand}, noThinking, got.add)
				}
				time.Sleep(3 * time.Second)
				settled := func(when string, rate float64) {
					got.take()
					time.Sleep(10 * time.Second)
					if c := u.rate.measured(); !about(c, rate, 0.15*rate) {
						t.Errorf("%s: the estimate is %.1f MB/s, not %.1f", when, c/1e6, rate/1e6)
					}
					if b := got.take() / 10; b < 0.95*rate {
						t.Errorf("%s: %.1f MB/s came of %.1f", when, b/1e6, rate/1e6)
					}
				}
				settled("at first", 8e6)
				n.setRate(32e6)
				time.Sleep(30 * time.Second) // until it has been probed for more
				settled("when it became faster", 32e6)
				n.setRate(3e6)
				time.Sleep(3 * time.Second)
				settled("when it became slower", 3e6)
			})
		})
	}
}

// TestEstimateKeeps: that nobody wants much, or that a host stands still, says nothing
// about what it can do.
func TestEstimateKeeps(t *testing.T) {
	simulate(t, 10e6, true, func(ctx context.Context, s *Scheduler, u *Upstream, n *simNet) {
		busy, stop := context.WithCancel(ctx)
		for range 8 {
			go n.download(busy, u, Standing{s.Flow("batch", "1"), Demand}, noThinking, func(int) {})
		}
		time.Sleep(5 * time.Second)
		before := u.rate.limit()
		n.setRate(0)
		time.Sleep(20 * time.Second)
		n.setRate(10e6)
		time.Sleep(time.Second)
		if after := u.rate.limit(); !about(after, before, 0.15*before) {
			t.Errorf("%.1f MB/s before the host stood still, %.1f after", before/1e6, after/1e6)
		}
		stop()
		time.Sleep(time.Second)
		slow, stop := context.WithCancel(ctx)
		for range 3 {
			go n.download(slow, u, Standing{s.Flow("batch", "1"), Demand}, func() { time.Sleep(50 * time.Millisecond) }, func(int) {})
		}
		time.Sleep(20 * time.Second)
		stop()
		if after := u.rate.limit(); !about(after, before, 0.15*before) {
			t.Errorf("%.1f MB/s before readers were slow, %.1f after", before/1e6, after/1e6)
		}
	})
}

// TestSharesOfAHost: many connections of batch leave to one of online what it asks for.
func TestSharesOfAHost(t *testing.T) {
	simulate(t, 10e6, true, func(ctx context.Context, s *Scheduler, u *Upstream, n *simNet) {
		var online, batch counter
		for range 20 {
			go n.download(ctx, u, Standing{s.Flow("batch", "1"), Demand}, noThinking, batch.add)
		}
		time.Sleep(5 * time.Second)
		for range 2 {
			short, stop := context.WithCancel(ctx)
			go n.download(short, u, Standing{s.Flow("online", "1"), Demand}, noThinking, online.add)
			time.Sleep(2 * time.Second)
			online.take()
			batch.take()
			time.Sleep(5 * time.Second)
			o, b := online.take()/5, batch.take()/5
			stop()
			if o < 0.75*10e6 || b < 0.03*10e6 || o+b < 0.95*10e6 {
				t.Errorf("online got %.1f MB/s and batch %.1f of 10", o/1e6, b/1e6)
			}
			time.Sleep(20 * time.Second)
			batch.take()
			time.Sleep(5 * time.Second)
			if b := batch.take() / 5; b < 0.95*10e6 {
				t.Errorf("batch alone got %.1f MB/s of 10", b/1e6)
			}
		}
	})
}

// TestHostsShareALink: when two hosts together are faster than the node's link, its
// classes still get their shares, whether somebody has said what it can do or not.
func TestHostsShareALink(t *testing.T) {
	for name, c := range map[string]struct {
		link  int64
		least float64 // part of online, who has 2 of 12 connections
	}{"said": {10e6, 0.75}, "measured": {0, 0.5}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer func() { cancel(); time.Sleep(time.Second) }()
				s := mustNew(t, Config{Link: c.link})
				n := newSimNet(ctx, 10e6)
				s.link.look = n.sample
				var online, batch counter
				for range 10 {
					go n.download(ctx, s.Upstream("a"), Standing{s.Flow("batch", "1"), Demand}, noThinking, batch.add)
				}
				time.Sleep(3 * time.Second)
				for range 2 {
					go n.download(ctx, s.Upstream("b"), Standing{s.Flow("online", "1"), Demand}, noThinking, online.add)
				}
				time.Sleep(3 * time.Second)
				online.take()
				batch.take()
				time.Sleep(10 * time.Second)
				o, b := online.take()/10, batch.take()/10
				if o < c.least*10e6 || b < 0.03*10e6 || o+b < 0.93*10e6 {
					t.Errorf("online got %.1f MB/s and batch %.1f of 10", o/1e6, b/1e6)
				}
			})
		})
	}
}

// TestSlowHost: who downloads from a fast host does not wait because a slow one is all
// that has been seen of the link.
func TestSlowHost(t *testing.T) {
	for _, class := range []string{"online", "batch"} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer func() { cancel(); time.Sleep(time.Second) }()
			s := mustNew(t, Config{})
			slow, fast := newSimNet(ctx, 1e6), newSimNet(ctx, 20e6)
			var got counter
			for range 4 {
				go slow.download(ctx, s.Upstream("slow"), Standing{s.Flow("batch", "1"), Demand}, noThinking, func(int) {})
			}
			time.Sleep(10 * time.Second)
			for range 4 {
				go fast.download(ctx, s.Upstream("fast"), Standing{s.Flow(class, "2"), Demand}, noThinking, got.add)
			}
			time.Sleep(time.Second)
			got.take()
			time.Sleep(5 * time.Second)
			if n := got.take() / 5; n < 0.9*20e6 {
				t.Errorf("%s got %.1f MB/s of 20 beside a slow host", class, n/1e6)
			}
		})
	}
}
