package sched

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// model is the order of a queue as slowly and as plainly as it can be said. Flows,
// classes and the two tiers (background work and all else) have virtual times; what they
// do not use is gone.
type model struct {
	waits   []*modelTicket // in no order
	tiers   [2]float64     // virtual time of each tier
	weights [2]float64
	now     float64            // start of the latest grant, of tiers
	classes map[[2]int]float64 // virtual time of each class in a tier
	shares  []float64
	nows    [2]float64 // start of the latest grant in a tier, of classes
	flows   map[Standing]float64
	ranks   map[[2]int]float64 // start of the latest grant in a rank of a class
}

type modelTicket struct {
	t *ticket
	s Standing
}

func tierOf(s Standing) int {
	if s.Rank == Background {
		return 1
	}
	return 0
}

// starts is when the next grants of a tier, and of a class in it, begin.
func (m *model) starts(s Standing) (tier, class float64) {
	k := tierOf(s)
	return max(m.tiers[k], m.now), max(m.classes[[2]int{s.Flow.order, k}], m.nows[k])
}

func (m *model) level(s Standing) [2]int { return [2]int{s.Flow.order, int(s.Rank)} }

// wait adds a ticket. A flow in which nothing waited begins where its rank is.
func (m *model) wait(t *ticket, s Standing) {
	if !slices.ContainsFunc(m.waits, func(o *modelTicket) bool { return o.s == s }) {
		m.flows[s] = max(m.flows[s], m.ranks[m.level(s)])
	}
	m.waits = append(m.waits, &modelTicket{t, s})
}

func (m *model) take(t *ticket) Standing {
	i := slices.IndexFunc(m.waits, func(o *modelTicket) bool { return o.t == t })
	s := m.waits[i].s
	m.waits = slices.Delete(m.waits, i, i+1)
	return s
}

// first is what goes first. Each class wants what its most urgent rank does. The tier
// that is furthest behind, that of no background work when both are; the class there
// that is furthest behind, the more important one when two are; the flow in its rank that
// is furthest behind, the one with the oldest ticket when two are; the oldest ticket of
// that.
func (m *model) first() *ticket {
	var best *modelTicket
	for _, w := range m.waits {
		hidden := slices.ContainsFunc(m.waits, func(o *modelTicket) bool {
			return o.s.Flow.order == w.s.Flow.order && o.s.Rank < w.s.Rank
		})
		if !hidden && (best == nil || m.before(w, best)) {
			best = w
		}
	}
	if best == nil {
		return nil
	}
	return best.t
}

func (m *model) before(a, b *modelTicket) bool {
	ca, cb := a.s.Flow.order, b.s.Flow.order
	tierA, classA := m.starts(a.s)
	tierB, classB := m.starts(b.s)
	switch {
	case tierOf(a.s) != tierOf(b.s) && tierA != tierB:
		return tierA < tierB
	case tierOf(a.s) != tierOf(b.s):
		return tierOf(a.s) < tierOf(b.s)
	case ca != cb && classA != classB:
		return classA < classB
	case ca != cb:
		return ca < cb
	case a.s.Flow != b.s.Flow && m.flows[a.s] != m.flows[b.s]:
		return m.flows[a.s] < m.flows[b.s]
	case a.s.Flow != b.s.Flow:
		return m.oldest(a.s) < m.oldest(b.s)
	}
	return a.t.seq < b.t.seq
}

func (m *model) oldest(s Standing) uint64 {
	least := ^uint64(0)
	for _, w := range m.waits {
		if w.s == s {
			least = min(least, w.t.seq)
		}
	}
	return least
}

func (m *model) grant(t *ticket, n int64) {
	s := m.take(t)
	c, k := s.Flow.order, tierOf(s)
	m.now, m.nows[k] = m.starts(s)
	m.tiers[k] = m.now + float64(n)/m.weights[k]
	m.classes[[2]int{c, k}] = m.nows[k] + float64(n)/m.shares[c]
	m.ranks[m.level(s)] = max(m.ranks[m.level(s)], m.flows[s])
	m.flows[s] += float64(n)
}

func (m *model) giveBack(s Standing, n int64) {
	k := tierOf(s)
	m.tiers[k] -= float64(n) / m.weights[k]
	m.classes[[2]int{s.Flow.order, k}] -= float64(n) / m.shares[s.Flow.order]
	m.flows[s] -= float64(n)
}

// FuzzCore lets work come, go, be promoted, be cancelled and give back, and compares the
// order with the model.
func FuzzCore(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 200, 201, 202, 203})
	f.Add([]byte("promotion and cancellation, of many and of few, again and again and again"))
	f.Add(slices.Repeat([]byte{7, 77, 177, 207, 217, 247}, 30))
	f.Fuzz(func(t *testing.T, ops []byte) {
		classes := []Class{{Name: "a", Share: 60}, {Name: "b", Share: 30}, {Name: "c", Share: 1}}
		s := mustNew(t, Config{Classes: classes})
		c := newCore(s.classes, s.orphan, false)
		m := &model{weights: [2]float64{90, 1}, classes: map[[2]int]float64{}, shares: []float64{60, 30, 1}, flows: map[Standing]float64{}, ranks: map[[2]int]float64{}}
		flows := map[string]*Flow{} // the core forgets none of them in this time
		var waiting, granted []*ticket
		for i, op := range ops[:min(len(ops), 900)] {
			now := time.Duration(i) * time.Millisecond
			arg := int(op) >> 3
			name := fmt.Sprint(arg % 3)
			class := classes[arg%3].Name
			if flows[class+name] == nil {
				flows[class+name] = s.Flow(class, name)
			}
			standing := Standing{flows[class+name], Rank(arg / 3 % 3)}
			switch pick := arg % max(len(waiting), 1); {
			case op%8 < 3:
				tk := &ticket{want: int64(arg)*100 + 1}
				c.put(tk, standing, now)
				m.wait(tk, standing)
				waiting = append(waiting, tk)
			case op%8 < 5:
				want := m.first()
				got, _, _ := c.first(now, nil)
				if got != want {
					t.Fatalf("operation %d: %+v goes first, not %+v", i, got, want)
				}
				if got != nil {
					c.grant(got, got.want, false, now)
					m.grant(got, got.want)
					granted = append(granted, got)
					waiting = slices.Delete(waiting, slices.Index(waiting, got), slices.Index(waiting, got)+1)
				}
			case op%8 == 5 && len(waiting) > 0:
				c.move(waiting[pick], standing, now)
				m.take(waiting[pick])
				m.wait(waiting[pick], standing)
			case op%8 == 6 && len(waiting) > 0:
				c.drop(waiting[pick], now)
				m.take(waiting[pick])
				waiting = slices.Delete(waiting, pick, pick+1)
			case op%8 == 7 && len(granted) > 0:
				tk := granted[len(granted)-1]
				granted = granted[:len(granted)-1]
				c.correct(tk.charge, -tk.got/2, now)
				m.giveBack(tk.real, tk.got/2)
			}
			if c.waiting != len(waiting) {
				t.Fatalf("operation %d: %d wait, not %d", i, c.waiting, len(waiting))
			}
		}
		checkTallies(t, &c, waiting)
	})
}

// checkTallies compares what a core says of itself with who waits.
func checkTallies(t *testing.T, c *core, waiting []*ticket) {
	t.Helper()
	want := map[Standing]int{}
	for _, tk := range waiting {
		want[Standing{nil, tk.real.Rank + Rank(3*tk.real.Flow.order)}]++
	}
	for i, sh := range c.shares {
		for r, n := range sh.tally.waiting {
			if n != want[Standing{nil, Rank(r + 3*i)}] || n != sh.levels[r].tickets {
				t.Fatalf("class %d: %d of rank %d wait, as is said", i, n, r)
			}
		}
	}
}
