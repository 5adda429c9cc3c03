package sched

import (
	"context"
	"sync"
	"time"
)

// Slots are turns, of which a bounded number is taken at a time. Nil Slots let
// everything pass.
type Slots struct {
	name  string
	clock func() time.Duration

	mu    sync.Mutex
	turns turns // protected by mu
}

func newSlots(name string, n int, s *Scheduler) *Slots {
	q := &Slots{name: name, clock: s.now}
	q.turns = turns{core: newCore(s.classes, s.orphan, s.cfg.Off), n: n, typical: 1000, important: -recentTime}
	q.turns.granted = func(t *ticket) { t.work.part(t) }
	return q
}

// recentTime is how long a turn is kept free for a class that wanted one.
const recentTime = time.Second

// newShortSlots returns Slots for turns that are so short that one is kept free for the
// most important class only while it is about.
func newShortSlots(name string, n int, s *Scheduler) *Slots {
	q := newSlots(name, n, s)
	q.turns.reserve, q.turns.recent = min(1, n-1), recentTime
	return q
}

// Enter waits for a turn; leave ends it, and may be called twice. Who has a turn does
// not wait for anything else meanwhile.
func (s *Slots) Enter(ctx context.Context) (leave func(), err error) {
	if err := ctx.Err(); err != nil || s == nil {
		return func() {}, err
	}
	w := From(ctx)
	t := &ticket{work: w, queue: s, want: 1}
	s.mu.Lock()
	now := s.clock()
	s.turns.put(t, w.join(t), now)
	s.turns.run(now)
	ready := t.hope()
	s.mu.Unlock()
	if ready != nil {
		select {
		case <-ready:
		case <-ctx.Done():
			s.cancel(t)
			return func() {}, ctx.Err()
		}
	}
	return sync.OnceFunc(func() { s.leave(t.turn) }), nil
}

func (s *Slots) leave(u turn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock()
	s.turns.leave(u, now)
	s.turns.run(now)
}

// cancel ends the wait of t, whatever has become of it.
func (s *Slots) cancel(t *ticket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock()
	if t.got > 0 {
		t.turn.began = now // it took no time
		s.turns.leave(t.turn, now)
	} else {
		s.turns.drop(t, now)
		t.work.part(t)
	}
	s.turns.run(now)
}

// moved lets t wait where its work belongs now.
func (s *Slots) moved(t *ticket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.acct == nil {
		return
	}
	now := s.clock()
	s.turns.move(t, t.work.Standing(), now)
	s.turns.run(now)
}
