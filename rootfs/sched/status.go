package sched

import (
	"slices"
	"time"
)

// Status says who waits for what, and what everybody got.
type Status struct {
	Queues []QueueStatus
}

// QueueStatus is one queue.
type QueueStatus struct {
	Name    string  // "link", "registry.example.com", "requests registry.example.com", "cpu", "disk", "relay"
	Rate    float64 // units a second lately: bytes, or for turns seconds of turns
	Limit   float64 // units a second that the queue hands out at most; 0: no bound known
	Turns   bool    // units are turns, not bytes
	Classes []ClassStatus
}

// ClassStatus is one class in a queue.
type ClassStatus struct {
	Class    string
	Waiting  [ranks]int    // pieces of work, by Rank
	Oldest   time.Duration // that one of them has waited
	Total    int64         // units since the start (bytes; turns: microseconds)
	Rate     float64       // units a second lately
	Waits    int64         // pieces of work that did not go at once
	Waited   time.Duration // sum of all waits
	Promoted int64         // pieces of work of other classes that were promoted to this one
}

// Status returns the state of all queues.
func (s *Scheduler) Status() Status {
	if s == nil {
		return Status{}
	}
	st := Status{Queues: []QueueStatus{s.link.status(), s.cpu.status(), s.disk.status(), s.relay.status()}}
	for _, u := range s.upstreams() {
		st.Queues = append(st.Queues, u.rate.status(), u.requests.status())
	}
	own := len(st.Queues)
	for _, turns := range s.turns() {
		q := turns.status()
		same := slices.IndexFunc(st.Queues[own:], func(o QueueStatus) bool { return o.Name == q.Name })
		if same < 0 {
			st.Queues = append(st.Queues, q)
			continue
		}
		st.Queues[own+same].add(q)
	}
	return st
}

// add takes in a queue of the same name and classes: one before it that nobody uses any
// more, or one that somebody else has.
func (q *QueueStatus) add(o QueueStatus) {
	q.Rate += o.Rate
	q.Limit = max(q.Limit, o.Limit)
	for i := range q.Classes {
		c, more := &q.Classes[i], o.Classes[i]
		for r := range c.Waiting {
			c.Waiting[r] += more.Waiting[r]
		}
		c.Oldest = max(c.Oldest, more.Oldest)
		c.Total += more.Total
		c.Rate += more.Rate
		c.Waits += more.Waits
		c.Waited += more.Waited
		c.Promoted += more.Promoted
	}
}

func (q *rateQueue) status() QueueStatus {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.clock()
	q.pace.forget(now)
	return q.pace.status(q.name, q.pace.rate, 1, now)
}

func (s *Slots) status() QueueStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock()
	s.turns.forget(now)
	out := s.turns.status(s.name, float64(s.turns.n), 1e-6, now)
	out.Turns = true
	return out
}
