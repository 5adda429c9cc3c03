package sched

import (
	"fmt"
	"testing"
	"time"
)

// onlineBatch are two classes as a node has them.
var onlineBatch = []Class{{Name: "online", Share: 95}, {Name: "batch", Share: 5}}

func mustNew(t testing.TB, cfg Config) *Scheduler {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sim is a pace under a clock that the test sets.
type sim struct {
	*Scheduler
	pace
	now time.Duration
	out []*ticket // granted by the latest run
}

func newSim(t testing.TB, rate float64, classes []Class) *sim {
	s := mustNew(t, Config{Classes: classes, Link: 1 << 50})
	m := &sim{Scheduler: s}
	m.core = newCore(s.classes, s.orphan, false)
	m.core.granted = func(t *ticket) { m.out = append(m.out, t) }
	m.bytes, m.percent = true, true
	m.setRate(rate, 0)
	return m
}

// standing of flow i of a class.
func (m *sim) standing(class string, i int, r Rank) Standing {
	return Standing{m.Flow(class, fmt.Sprint("sandbox ", i)), r}
}

func (m *sim) want(s Standing, n int64) *ticket {
	t := &ticket{want: n}
	m.ask(t, s, m.now)
	return t
}

// step lets time pass until something is granted, at most until end, and returns what.
func (m *sim) step(end time.Duration) []*ticket {
	m.out = nil
	for len(m.out) == 0 && m.now < end {
		wake := m.run(m.now)
		if len(m.out) == 0 {
			if wake == 0 || wake > end {
				wake = end
			}
			m.now = max(wake, m.now)
		}
	}
	return m.out
}

// busy keeps everybody waiting, with want bytes a time, until end, and returns what each
// got.
func (m *sim) busy(end time.Duration, want func() int64, all ...Standing) map[Standing]int64 {
	got := map[Standing]int64{}
	for _, s := range all {
		m.want(s, want())
	}
	for m.now < end {
		for _, t := range m.step(end) {
			got[t.real] += t.got
			m.want(t.real, want())
		}
	}
	return got
}

func byClass(got map[Standing]int64) map[string]int64 {
	sums := map[string]int64{}
	for s, n := range got {
		sums[s.Flow.Class().Name] += n
	}
	return sums
}

// about says whether got is want, or slack more or less.
func about(got, want, slack float64) bool { return got >= want-slack && got <= want+slack }
