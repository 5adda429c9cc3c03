package sched

import (
	"cmp"
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// rateQueue is a pace for goroutines.
type rateQueue struct {
	name  string
	clock func() time.Duration
	free  bool // the scheduler is off: there is no bound
	// most is what the node's link can do, when somebody has said it: a host of which
	// nothing is known, as the link limits it, gets the receive windows for that.
	most  float64
	wires wires
	all   *atomic.Int64                                  // bytes that were read from all hosts
	look  func(readers int, capacity float64) wireSample // that of wires

	mu    sync.Mutex
	pace  pace     // protected by mu
	est   estimate // protected by mu
	timer alarm    // protected by mu
}

func newRateQueue(name string, s *Scheduler) *rateQueue {
	q := &rateQueue{name: name, clock: s.now, free: s.cfg.Off, most: float64(s.cfg.Link), all: &s.read}
	q.pace.core = newCore(s.classes, s.orphan, s.cfg.Off)
	q.pace.granted = q.granted
	q.look = q.wires.sample
	return q
}

// hold is what a queue has granted and what has not been read yet.
type hold struct {
	n      int64
	charge charge
}

// receive waits until some of n bytes may be received.
func (q *rateQueue) receive(ctx context.Context, w *Work, n int64) (hold, error) {
	t := &ticket{work: w, queue: q, want: n}
	q.mu.Lock()
	now := q.clock()
	q.est.pass(now)
	q.est.waiting++
	q.pace.ask(t, w.join(t), now)
	q.run(now)
	ready := t.hope()
	q.mu.Unlock()
	if ready != nil {
		select {
		case <-ready:
		case <-ctx.Done():
			q.cancel(t)
			return hold{}, ctx.Err()
		}
	}
	return hold{n: t.got, charge: t.charge}, nil
}

// granted counts a ticket that leaves the queue. Precondition: mu is held.
func (q *rateQueue) granted(t *ticket) {
	t.work.part(t)
	q.est.waiting--
	q.est.held++
}

// reads says that the reader who has h begins to read: it waits for no other queue.
func (q *rateQueue) reads(h hold) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.est.pass(q.clock())
	q.est.held--
	q.est.out++
}

// refuse takes back what nobody has begun to read.
func (q *rateQueue) refuse(h hold) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.clock()
	q.refused(h, now)
	q.run(now)
}

func (q *rateQueue) refused(h hold, now time.Duration) {
	q.est.pass(now)
	q.est.held--
	q.pace.unused(h.charge, h.n, now)
}

// cancel ends the wait of t, whatever has become of it.
func (q *rateQueue) cancel(t *ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.clock()
	if t.got > 0 {
		q.refused(hold{n: t.got, charge: t.charge}, now)
	} else {
		q.est.pass(now)
		q.est.waiting--
		q.pace.drop(t, now)
		t.work.part(t)
	}
	q.run(now)
}

// received ends a hold of which n bytes came.
func (q *rateQueue) received(h hold, n int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.clock()
	q.ended(h, n, now)
	q.run(now)
}

func (q *rateQueue) ended(h hold, n int64, now time.Duration) {
	q.est.ended(n, now)
	if n < h.n {
		q.pace.unused(h.charge, h.n-n, now)
	}
}

// engage counts requests that are under way, so that it is known how many of them read.
func (q *rateQueue) engage(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.est.pass(q.clock())
	q.est.engaged += n
}

// run grants what may go, and sets the timer. Precondition: mu is held.
func (q *rateQueue) run(now time.Duration) {
	if q.free {
		q.pace.run(now)
		return
	}
	q.est.pass(now)
	if q.est.due(now) {
		wire := q.look(q.est.readers(), cmp.Or(q.est.capacity, q.most))
		wire.all = q.all.Load()
		q.est.close(now, wire)
	}
	q.est.contend(q.pace.contend(now))
	q.pace.setRate(q.est.rate(), now)
	q.pace.limitLesser(q.est.lesser(), now)
	q.timer.at(q.pace.run(now), now, q.tick)
	q.timer.at(q.est.next(now), now, q.tick)
}

func (q *rateQueue) tick() {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.clock()
	if q.timer.rang(now) > lateTimer {
		q.est.win.late = true
	}
	q.run(now)
}

// moved lets t wait where its work belongs now.
func (q *rateQueue) moved(t *ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.acct == nil {
		return
	}
	now := q.clock()
	q.pace.move(t, t.work.Standing(), now)
	q.run(now)
}

// hope is what to wait for; nil when t has got something. Precondition: the queue's lock.
func (t *ticket) hope() <-chan struct{} {
	if t.got > 0 {
		return nil
	}
	t.ready = make(chan struct{})
	return t.ready
}

// alarm is a timer that is set again and again.
type alarm struct {
	timer *time.Timer
	due   time.Duration // 0: it is not set
}

// at lets f run at due, if that is not 0. An alarm that is set for an earlier time
// stays: it rings in vain.
func (a *alarm) at(due, now time.Duration, f func()) {
	if due == 0 || a.due != 0 && a.due <= due {
		return
	}
	a.due = due
	if a.timer == nil {
		a.timer = time.AfterFunc(due-now, f)
		return
	}
	a.timer.Reset(due - now)
}

// rang is how late it rings.
func (a *alarm) rang(now time.Duration) time.Duration {
	late := now - a.due
	a.due = 0
	return late
}
