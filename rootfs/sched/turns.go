package sched

import "time"

// turns hands out a bounded number of turns. A unit of what is charged is a microsecond.
type turns struct {
	core
	n       int
	reserve int           // turns that only the most important work may take, which is never background work
	ranked  bool          // in the most important class, that is only what somebody waits for
	recent  time.Duration // the reserve is kept so long after the most important class; 0: always

	used, low int           // turns that are taken, and those by less important work
	important time.Duration // when the most important class last wanted something
	typical   float64       // microseconds of a turn
}

// turn is one that somebody has.
type turn struct {
	charge charge
	cost   int64 // charged so far
	low    bool
	began  time.Duration
}

// run grants what may go now.
func (s *turns) run(now time.Duration) {
	for s.used < s.n && s.waiting > 0 {
		if s.shares[0].first() < int(Background) {
			s.important = now
		}
		t, _, _ := s.first(now, func(class int, r Rank) bool { return !s.isLow(class, r) || s.low < s.room(now) })
		if t == nil {
			return
		}
		s.take(t, now)
	}
}

func (s *turns) take(t *ticket, now time.Duration) {
	low := s.isLow(t.real.Flow.order, t.real.Rank)
	s.used++
	if low {
		s.low++
	}
	cost := max(int64(s.typical), 1)
	t.turn = turn{charge{t.real.Flow, t.real.Rank}, cost, low, now}
	s.grant(t, cost, false, now)
}

func (s *turns) isLow(class int, r Rank) bool {
	return !s.off && (class > 0 || r == Background || s.ranked && r > Demand)
}

// room is how many turns less important work may have.
func (s *turns) room(now time.Duration) int {
	if s.recent > 0 && s.important+s.recent <= now {
		return s.n
	}
	return max(s.n-s.reserve, 1)
}

// leave ends a turn.
func (s *turns) leave(u turn, now time.Duration) {
	s.used--
	if u.low {
		s.low--
	}
	if u.charge.flow.order == 0 && u.charge.rank < Background {
		s.important = now
	}
	took := (now - u.began).Microseconds()
	s.typical += (float64(took) - s.typical) / 16
	s.correct(u.charge, took-u.cost, now)
}
