package sched

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"
)

// turnSim is turns under a clock that the test sets.
type turnSim struct {
	*Scheduler
	turns
	now  time.Duration
	held []turn
}

func newTurnSim(t *testing.T, n int, classes []Class) *turnSim {
	m := &turnSim{Scheduler: mustNew(t, Config{Classes: classes})}
	m.turns = turns{core: newCore(m.classes, m.orphan, false), n: n, typical: 1000, important: -recentTime}
	m.granted = func(t *ticket) { m.held = append(m.held, t.turn) }
	return m
}

func (m *turnSim) want(class, id string, r Rank) {
	m.put(&ticket{want: 1}, Standing{m.Flow(class, id), r}, m.now)
	m.run(m.now)
}

// end ends turn i of those that are held.
func (m *turnSim) end(i int) turn {
	u := m.held[i]
	m.held = slices.Delete(m.held, i, i+1)
	m.leave(u, m.now)
	m.run(m.now)
	return u
}

func (m *turnSim) of(class string) (n int) {
	for _, u := range m.held {
		if u.charge.flow.Class().Name == class {
			n++
		}
	}
	return n
}

// TestTurnsByTime: who computes longer gets fewer turns; the time goes by shares, and
// evenly among flows.
func TestTurnsByTime(t *testing.T) {
	m := newTurnSim(t, 1, []Class{{Name: "a", Share: 75}, {Name: "b", Share: 25}})
	r := rand.New(rand.NewPCG(1, 1))
	lasts := map[string]time.Duration{"a1": 8 * time.Millisecond, "a2": time.Millisecond, "b1": 3 * time.Millisecond}
	used := map[string]time.Duration{}
	for name := range lasts {
		for range 3 {
			m.want(name[:1], name, Demand)
		}
	}
	for m.now < 100*time.Second {
		name := m.held[0].charge.flow.ID()
		d := lasts[name]/2 + time.Duration(r.Int64N(int64(lasts[name])))
		m.now += d
		used[name] += d
		m.end(0)
		m.want(name[:1], name, Demand)
	}
	all := m.now.Seconds()
	for name, want := range map[string]float64{"a1": 0.375, "a2": 0.375, "b1": 0.25} {
		if got := used[name].Seconds() / all; !about(got, want, 0.02) {
			t.Errorf("%s got %.3f of the time, not %.3f", name, got, want)
		}
	}
}

// TestReserve: less important work does not take the last turns, as long as more
// important work is about; then it may.
func TestReserve(t *testing.T) {
	m := newTurnSim(t, 4, onlineBatch)
	m.reserve, m.recent = 1, recentTime
	for range 10 {
		m.want("batch", "b", Demand)
	}
	if n := m.of("batch"); n != 4 {
		t.Fatalf("batch alone has %d of 4 turns", n)
	}
	m.want("online", "o", Prefetch)
	if m.of("online") != 0 {
		t.Fatal("a turn was taken away")
	}
	m.now += time.Millisecond
	m.end(0)
	if m.of("online") != 1 || m.of("batch") != 3 {
		t.Fatalf("online has %d turns and batch %d", m.of("online"), m.of("batch"))
	}
	m.end(slices.IndexFunc(m.held, func(u turn) bool { return u.charge.flow.order == 0 }))
	if n := m.of("batch"); n != 3 {
		t.Fatalf("batch has %d turns just after online had one", n)
	}
	m.now += 2 * recentTime
	m.end(0)
	if n := m.of("batch"); n != 4 {
		t.Errorf("batch has %d turns long after online had one", n)
	}
}

// TestReserveForDemand: of requests to a host some are kept for what somebody waits for.
func TestReserveForDemand(t *testing.T) {
	m := newTurnSim(t, 4, onlineBatch)
	m.reserve, m.ranked = 2, true
	for range 5 {
		m.want("online", "o", Prefetch)
		m.want("batch", "b", Demand)
	}
	if n := len(m.held); n != 2 {
		t.Fatalf("%d turns are taken by what may wait, not 2", n)
	}
	m.want("online", "o", Demand)
	m.want("online", "p", Demand)
	m.want("online", "q", Demand)
	if n := len(m.held); n != 4 {
		t.Fatalf("%d turns of 4 are taken", n)
	}
	for m.now < 10*time.Second && m.waiting > 0 {
		m.now += time.Millisecond
		m.end(0)
	}
	if m.waiting > 0 {
		t.Errorf("%d wait for ever", m.waiting)
	}
}

// TestNeverMoreTurnsThanThereAre, and never fewer while somebody may have one.
func TestNeverMoreTurnsThanThereAre(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 7))
		m := newTurnSim(t, 1+r.IntN(5), onlineBatch)
		m.reserve, m.ranked = r.IntN(m.n), r.IntN(2) == 0
		for range 500 {
			m.now += time.Duration(r.Int64N(int64(time.Millisecond)))
			if r.IntN(2) == 0 || len(m.held) == 0 {
				m.want(onlineBatch[r.IntN(2)].Name, "f", Rank(r.IntN(3)))
			} else {
				m.end(r.IntN(len(m.held)))
			}
			if len(m.held) > m.n || len(m.held) != m.used {
				t.Fatalf("seed %d: %d turns are taken of %d", seed, len(m.held), m.n)
			}
			urgent := m.shares[0].levels[Demand].tickets > 0
			if m.used < m.n && (urgent || m.waiting > 0 && m.low < m.room(m.now)) {
				t.Fatalf("seed %d: somebody waits and %d turns of %d are taken", seed, m.used, m.n)
			}
		}
	}
}

// What somebody made anew is still one queue to who looks at them: the one before it is
// there until it is collected.
func TestStatusOfEqualTurns(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		own := s.Turns("own", 3)
		for range 2 {
			leave, err := own.Enter(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer leave()
		}
		defer runtime.KeepAlive(own)
	}
	found := 0
	for _, q := range s.Status().Queues {
		if q.Name == "own" {
			found++
			if q.Limit != 3 || q.Classes[0].Total < 4 {
				t.Errorf("%+v", q)
			}
		}
	}
	if found != 1 {
		t.Errorf("there are %d queues of one name", found)
	}
}
