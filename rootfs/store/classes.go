package store

import (
	"cmp"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// ranks is how many ranks there are.
const ranks = int(sched.Background) + 1

// ClassStats says what users of one class have read.
type ClassStats struct {
	Class          string // empty: of users that nobody has given one
	Hits, HitBytes int64  // reads that did not wait, and their bytes
	Ranks          [ranks]RankStats
}

// RankStats are reads of one rank that waited for a fetch.
type RankStats struct {
	Misses, MissBytes int64
	Wait              time.Duration // of all misses together
	// Promoted is how many fetches, begun for others or for later, became more urgent
	// because a read of this rank joined them.
	Promoted int64
}

type classCounters struct {
	hits, hitBytes atomic.Int64
	misses         [ranks]rankCounters
}

type rankCounters struct{ misses, bytes, wait, promoted atomic.Int64 }

func (c *classCounters) hit(n int64) {
	c.hits.Add(1)
	c.hitBytes.Add(n)
}

func (c *classCounters) miss(r sched.Rank, n int64, waited time.Duration) {
	m := &c.misses[r]
	m.misses.Add(1)
	m.bytes.Add(n)
	m.wait.Add(int64(waited))
}

// class returns the counters of a class. There are as many as the configuration has
// classes.
func (c *counters) class(name string) *classCounters {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.classes == nil {
		c.classes = map[string]*classCounters{}
	}
	if c.classes[name] == nil {
		c.classes[name] = &classCounters{}
	}
	return c.classes[name]
}

func (c *counters) classStats() []ClassStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []ClassStats
	for name, n := range c.classes {
		s := ClassStats{Class: name, Hits: n.hits.Load(), HitBytes: n.hitBytes.Load()}
		for r := range s.Ranks {
			m := &n.misses[r]
			s.Ranks[r] = RankStats{
				Misses: m.misses.Load(), MissBytes: m.bytes.Load(),
				Wait: time.Duration(m.wait.Load()), Promoted: m.promoted.Load(),
			}
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b ClassStats) int { return cmp.Compare(a.Class, b.Class) })
	return out
}

// add adds what a class has read to the sums.
func (s *Stats) add(c *ClassStats) {
	s.Hits += c.Hits
	s.HitBytes += c.HitBytes
	for _, r := range c.Ranks {
		s.Misses += r.Misses
		s.MissBytes += r.MissBytes
		s.Wait += r.Wait
	}
}
