package sched

import "time"

// tally counts what a class got of a queue.
type tally struct {
	waiting  [ranks]int
	total    int64
	lately   lately
	waits    int64
	waited   time.Duration
	promoted int64
}

func (t *tally) granted(n int64, waited, now time.Duration) {
	if waited > 0 {
		t.waits++
	}
	t.waited += waited
	t.add(n, now)
}

func (t *tally) add(n int64, now time.Duration) {
	t.total += n
	t.lately.add(now, float64(n))
}

// status describes the queue; units says how many units of Status one unit is.
func (c *core) status(name string, limit float64, units float64, now time.Duration) QueueStatus {
	q := QueueStatus{Name: name, Limit: limit}
	for _, s := range c.shares {
		t := &s.tally
		cs := ClassStatus{Class: s.class.Name, Waiting: t.waiting, Total: t.total,
			Rate: max(t.lately.rate(now), 0) * units, Waits: t.waits, Waited: t.waited, Promoted: t.promoted}
		q.Rate += cs.Rate
		q.Classes = append(q.Classes, cs)
	}
	c.each(func(t *ticket) {
		cs := &q.Classes[t.real.Flow.order]
		cs.Oldest = max(cs.Oldest, now-t.since)
		cs.Waits++
		cs.Waited += now - t.since
	})
	return q
}

// each calls f for everything that waits.
func (c *core) each(f func(t *ticket)) {
	for _, s := range c.shares {
		for r := range s.levels {
			for _, a := range s.levels[r].waiting.items {
				for _, t := range a.wait.items {
					f(t)
				}
			}
		}
	}
}

// forget drops the flows that have wanted nothing for a while.
func (c *core) forget(now time.Duration) {
	for _, s := range c.shares {
		for r := range s.levels {
			s.levels[r].forget(now)
		}
	}
}
