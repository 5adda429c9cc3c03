package sched

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// randomWant asks for a few bytes or for many.
func randomWant(r *rand.Rand) func() int64 {
	return func() int64 { return 1 + r.Int64N(1<<(10+r.IntN(10))) }
}

// TestShares: over any time in which all want something, each class gets its share, and
// each flow of a class as much as the others, whatever they ask for at a time.
func TestShares(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 1))
		rate := 1e6 * float64(1+r.IntN(2000))
		var classes []Class
		var all []Standing
		sum := 0
		for i := range 2 + r.IntN(3) {
			classes = append(classes, Class{Name: fmt.Sprint("class ", i), Share: 1 + r.IntN(99)})
			sum += classes[i].Share
		}
		m := newSim(t, rate, classes)
		flows := 1 + r.IntN(5)
		for _, c := range classes {
			for i := range flows {
				for range 1 + r.IntN(3) { // who asks more often gets no more
					all = append(all, m.standing(c.Name, i, Demand))
				}
			}
		}
		got := m.busy(time.Duration(200+r.IntN(1000))*m.perQuantum(), randomWant(r), all...)
		// The unfairness of start-time fair queueing is one grant of each in its weight.
		grant := float64(max(m.quantum(), 512<<10))
		total := 0.0
		for _, n := range byClass(got) {
			total += float64(n)
		}
		if want := rate * m.now.Seconds(); !about(total, want, 2*grant) {
			t.Fatalf("seed %d: %.0f bytes were handed out, not %.0f", seed, total, want)
		}
		for _, c := range classes {
			part := float64(c.Share) / float64(sum)
			if n := float64(byClass(got)[c.Name]); !about(n, total*part, grant*float64(len(classes)+1)) {
				t.Fatalf("seed %d: %s has %d of %d shares and got %.0f of %.0f bytes", seed, c.Name, c.Share, sum, n, total)
			}
		}
		for s, n := range got {
			if mean := float64(byClass(got)[s.Flow.Class().Name]) / float64(flows); !about(float64(n), mean, 2*grant) {
				t.Fatalf("seed %d: %s got %d bytes, the flows of its class %.0f each", seed, s.Flow.ID(), n, mean)
			}
		}
	}
}

func (p *pace) perQuantum() time.Duration {
	return time.Duration(float64(max(p.quantum(), 512<<10)) / p.rate * 1e9)
}

// TestWorkConserving: as long as anybody waits the whole rate is handed out, whoever
// comes and goes.
func TestWorkConserving(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 2))
		m := newSim(t, 1e7, onlineBatch)
		want := randomWant(r)
		var sent int64
		var busy time.Duration // since when somebody waits
		for range 400 {
			if m.waiting == 0 {
				m.now += time.Duration(r.Int64N(int64(50 * time.Millisecond)))
				m.run(m.now) // as a timer or another caller would
				sent, busy = 0, m.now
			}
			for range 1 + r.IntN(4) {
				class := onlineBatch[r.IntN(2)].Name
				m.want(m.standing(class, r.IntN(5), Rank(r.IntN(3))), want())
			}
			for range 1 + r.IntN(6) {
				for _, g := range m.step(m.now + time.Second) {
					sent += g.got
				}
				if m.waiting == 0 {
					break
				}
			}
			least := (m.now-busy).Seconds()*m.rate - float64(m.quantum())
			most := (m.now-busy).Seconds()*m.rate + m.burst(idleBurst) + 1<<20
			if float64(sent) < least || float64(sent) > most {
				t.Fatalf("seed %d: %d bytes in a busy time in which %.0f to %.0f can pass", seed, sent, least, most)
			}
		}
	}
}

func TestFloorsAndCeilings(t *testing.T) {
	const rate = 1e8
	for _, c := range []struct {
		name    string
		classes []Class
		want    map[string]float64 // part of the rate
		idle    string             // a class that wants nothing
	}{
		{name: "floor above the share", classes: []Class{{Name: "a", Share: 95}, {Name: "b", Share: 5, Floor: Rate{Percent: 20}}},
			want: map[string]float64{"a": 0.8, "b": 0.2}},
		{name: "floor in bytes", classes: []Class{{Name: "a", Share: 95}, {Name: "b", Share: 5, Floor: Rate{Bytes: 3e7}}},
			want: map[string]float64{"a": 0.7, "b": 0.3}},
		{name: "floor below the share", classes: []Class{{Name: "a", Share: 50}, {Name: "b", Share: 50, Floor: Rate{Percent: 20}}},
			want: map[string]float64{"a": 0.5, "b": 0.5}},
		{name: "floor of a class alone", classes: []Class{{Name: "a", Share: 95}, {Name: "b", Share: 5, Floor: Rate{Percent: 20}}},
			want: map[string]float64{"b": 1}, idle: "a"},
		{name: "what the floor leaves goes by shares", classes: []Class{{Name: "a", Share: 60}, {Name: "b", Share: 30}, {Name: "c", Share: 1, Floor: Rate{Percent: 10}}},
			want: map[string]float64{"a": 0.6, "b": 0.3, "c": 0.1}},
		{name: "floors beyond the rate", classes: []Class{{Name: "a", Share: 90}, {Name: "b", Share: 5, Floor: Rate{Bytes: 1e9}}, {Name: "c", Share: 5, Floor: Rate{Bytes: 1e9}}},
			want: map[string]float64{"a": 0.05, "b": 0.475, "c": 0.475}},
		{name: "ceiling", classes: []Class{{Name: "a", Share: 50}, {Name: "b", Share: 50, Ceiling: Rate{Percent: 10}}},
			want: map[string]float64{"a": 0.9, "b": 0.1}},
		{name: "ceiling of a class alone", classes: []Class{{Name: "a", Share: 50}, {Name: "b", Share: 50, Ceiling: Rate{Bytes: 1e7}}},
			want: map[string]float64{"b": 0.1}, idle: "a"},
		{name: "ceiling above the share", classes: []Class{{Name: "a", Share: 80}, {Name: "b", Share: 20, Ceiling: Rate{Percent: 30}}},
			want: map[string]float64{"a": 0.8, "b": 0.2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newSim(t, rate, c.classes)
			var all []Standing
			for _, class := range c.classes {
				if class.Name != c.idle {
					all = append(all, m.standing(class.Name, 1, Demand), m.standing(class.Name, 2, Demand))
				}
			}
			got := byClass(m.busy(5*time.Second, randomWant(rand.New(rand.NewPCG(1, 3))), all...))
			for class, part := range c.want {
				if n := float64(got[class]); !about(n, part*rate*5, 0.02*rate*5) {
					t.Errorf("%s got %.1f%% of the rate, not %.1f%%", class, n/rate/5*100, part*100)
				}
			}
		})
	}
}

// TestRanks: in a class nothing of a rank goes while something more urgent waits, and
// another class goes on meanwhile.
func TestRanks(t *testing.T) {
	m := newSim(t, 1e8, onlineBatch)
	got := m.busy(time.Second, func() int64 { return 64 << 10 },
		m.standing("online", 1, Demand), m.standing("online", 1, Prefetch), m.standing("online", 2, Background),
		m.standing("batch", 1, Prefetch), m.standing("batch", 2, Background))
	for s, n := range got {
		first := s.Flow.Class().Name == "online" && s.Rank == Demand || s.Flow.Class().Name == "batch" && s.Rank == Prefetch
		if !first {
			t.Errorf("%s %s got %d bytes while more urgent work waited", s.Flow.Class().Name, s.Rank, n)
		}
	}
	if len(got) != 2 {
		t.Errorf("%d standings got something, not 2", len(got))
	}
}

// TestBackground: what nobody has asked for, of all classes together, gets the part of
// the least class beside what is asked for, whoever asks; of that each class its share.
// Alone it gets everything.
func TestBackground(t *testing.T) {
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 5))
		var classes []Class
		sum, least := 0, 100
		for i := range 2 + r.IntN(3) {
			classes = append(classes, Class{Name: fmt.Sprint("class ", i), Share: 1 + r.IntN(99)})
			sum, least = sum+classes[i].Share, min(least, classes[i].Share)
		}
		m := newSim(t, 1e8, classes)
		asks := r.IntN(len(classes)) // all but this one want background work only
		all := []Standing{m.standing(classes[asks].Name, 1, Rank(r.IntN(2)))}
		fill := 0
		for i, c := range classes {
			if i != asks {
				all = append(all, m.standing(c.Name, 1, Background))
				fill += c.Share
			}
		}
		got := m.busy(4*time.Second, randomWant(r), all...)
		total, back := 0.0, 0.0
		for s, n := range got {
			total += float64(n)
			if s.Rank == Background {
				back += float64(n)
			}
		}
		if want := total * float64(least) / float64(sum); !about(back, want, 3<<20) {
			t.Errorf("seed %d: background work got %.0f bytes of %.0f, not %.0f", seed, back, total, want)
		}
		for s, n := range got {
			want := back * float64(s.Flow.Class().Share) / float64(fill)
			if s.Rank == Background && !about(float64(n), want, 3<<20) {
				t.Errorf("seed %d: background work of %s got %d bytes of %.0f, not %.0f", seed, s.Flow.Class().Name, n, back, want)
			}
		}
	}
	m := newSim(t, 1e8, onlineBatch)
	got := byClass(m.busy(time.Second, func() int64 { return 64 << 10 }, m.standing("online", 1, Background), m.standing("batch", 1, Background)))
	if !about(float64(got["online"]), 0.95e8, 2e6) || !about(float64(got["batch"]), 0.05e8, 1e6) {
		t.Errorf("background work alone got %v", got)
	}
}

// TestBackgroundIsNotCharged: what a class got for background work is not taken from
// what it asks for then.
func TestBackgroundIsNotCharged(t *testing.T) {
	m := newSim(t, 1e8, []Class{{Name: "a", Share: 60}, {Name: "b", Share: 30}, {Name: "c", Share: 10}})
	m.busy(5*time.Second, func() int64 { return 64 << 10 }, m.standing("a", 1, Background), m.standing("c", 1, Demand))
	a, b := m.standing("a", 1, Demand), m.standing("b", 1, Demand)
	got := m.busy(6*time.Second, func() int64 { return 64 << 10 }, a, b)
	if !about(float64(got[a]), 0.6e8, 2e6) || !about(float64(got[b]), 0.3e8, 2e6) {
		t.Errorf("a got %d bytes and b %d of 100 MB", got[a], got[b])
	}
}

// TestBackgroundOfOpen: where the most important class passes freely, its background
// work does not once another class asks for something.
func TestBackgroundOfOpen(t *testing.T) {
	m := newSim(t, 1e8, onlineBatch)
	m.open = true
	fill, job := m.standing("online", 1, Background), m.standing("batch", 1, Demand)
	m.want(fill, 64<<10)
	m.contend(0)
	if m.top != (peak{class: 0}) {
		t.Errorf("the peak is %+v while online fills alone", m.top)
	}
	m.want(job, 64<<10)
	m.contend(0)
	if m.top != (peak{class: 1, urgent: true}) {
		t.Errorf("the peak is %+v while batch asks for something", m.top)
	}
	got := map[Standing]int64{}
	for m.now < time.Second {
		for range 8 { // as fast as it may
			m.want(job, 64<<10)
		}
		m.contend(m.now)
		m.out = nil
		m.run(m.now)
		for _, g := range m.out {
			got[g.real] += g.got
			if g.real == fill {
				m.want(fill, 64<<10)
			}
		}
		m.now += time.Millisecond
	}
	if n := float64(got[fill]); !about(n, 0.05e8, 0.02e8) || got[job] < 4e8 {
		t.Errorf("the fill got %d bytes and batch %d", got[fill], got[job])
	}
}

// TestNothingIsSavedUp: who wanted nothing for long gets no more than its share then.
func TestNothingIsSavedUp(t *testing.T) {
	m := newSim(t, 1e8, []Class{{Name: "a", Share: 50}, {Name: "b", Share: 50}})
	b1 := m.standing("b", 1, Demand)
	m.busy(10*time.Second, func() int64 { return 64 << 10 }, b1)
	got := m.busy(11*time.Second, func() int64 { return 64 << 10 }, m.standing("a", 1, Demand), m.standing("b", 2, Demand))
	classes := byClass(got)
	if a, b := float64(classes["a"]), float64(classes["b"]); !about(a, b, 0.01e8) {
		t.Errorf("a got %.0f bytes after a long time without, b %.0f", a, b)
	}
	if n1, n2 := float64(got[b1]), float64(got[m.standing("b", 2, Demand)]); !about(n1, n2, 0.01e8) {
		t.Errorf("the new flow of b got %.0f bytes, the old one %.0f", n2, n1)
	}
}

// TestImportantWorkGoesAtOnce: what comes first waits for what has been granted already,
// which is one quantum.
func TestImportantWorkGoesAtOnce(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 4))
		m := newSim(t, 1e8, onlineBatch)
		for i := range 1000 {
			m.want(m.standing("batch", i%20, Rank(i%3)), 1<<20)
		}
		for range r.IntN(300) {
			m.step(m.now + time.Second)
		}
		m.now += time.Duration(r.Int64N(int64(time.Millisecond)))
		online := m.want(m.standing("online", 1, Prefetch), 1<<20)
		before := m.now
		m.step(m.now + time.Second)
		if online.got == 0 {
			t.Fatalf("seed %d: batch went before online", seed)
		}
		if waited := m.now - before; waited > 2*quantumTime {
			t.Fatalf("seed %d: online waited %v", seed, waited)
		}
	}
}

// TestNoStarvation: every class and flow gets something within a bounded number of
// grants, whatever their shares.
func TestNoStarvation(t *testing.T) {
	m := newSim(t, 1e8, []Class{{Name: "a", Share: 1000}, {Name: "b", Share: 1}})
	for i := range 50 {
		m.want(m.standing("a", i, Demand), 1<<20)
	}
	poor := m.want(m.standing("b", 1, Background), 1)
	for grants := 0; poor.got == 0; grants++ {
		if grants > 1100 {
			t.Fatal("a class with one share of 1001 got nothing of 1100 grants")
		}
		for _, g := range m.step(m.now + time.Second) {
			if g != poor {
				m.want(g.real, 1<<20)
			}
		}
	}
	seen := map[*Flow]int{}
	for range 100 {
		for _, g := range m.step(m.now + time.Second) {
			seen[g.real.Flow]++
			m.want(g.real, 1<<20)
		}
	}
	if len(seen) < 50 {
		t.Errorf("%d of 50 flows got something in 100 grants", len(seen))
	}
}

// TestLesserClassesMakeRoom: while the network is full of what others asked for, all but
// the most important class that wants something are held back.
func TestLesserClassesMakeRoom(t *testing.T) {
	m := newSim(t, 1e8, onlineBatch)
	m.want(m.standing("online", 1, Demand), 1)
	m.step(time.Second)
	m.contend(0)
	m.limitLesser(3e7, 0)
	got := byClass(m.busy(time.Second, func() int64 { return 64 << 10 }, m.standing("batch", 1, Demand)))
	if n := float64(got["batch"]); !about(n, 3e7, 0.1e7) {
		t.Errorf("batch got %.0f bytes, not 30 MB", n)
	}
	m.limitLesser(0, m.now)
	got = byClass(m.busy(2*time.Second, func() int64 { return 64 << 10 }))
	if n := float64(got["batch"]); !about(n, 1e8, 0.1e8) {
		t.Errorf("batch got %.0f bytes then, not 100 MB", n)
	}
}

// TestOpen: where the rate is only what has been seen, the most important class may
// exceed it; the others get what that leaves, and their shares in any case.
func TestOpen(t *testing.T) {
	classes := []Class{{Name: "a", Share: 80}, {Name: "b", Share: 15}, {Name: "c", Share: 5, Floor: Rate{Percent: 10}}}
	for _, c := range []struct {
		top  float64            // bytes a second that a takes
		want map[string]float64 // of the rate
	}{
		{top: 0.4, want: map[string]float64{"a": 0.4, "b": 0.45, "c": 0.15}},
		{top: 3, want: map[string]float64{"a": 3, "b": 0.19, "c": 0.06}},
	} {
		m := newSim(t, 1e8, classes)
		m.open = true
		b, cc := m.standing("b", 1, Demand), m.standing("c", 1, Demand)
		m.want(b, 64<<10)
		m.want(cc, 64<<10)
		got := map[string]float64{}
		var asked float64
		for m.now < 5*time.Second {
			if due := c.top * m.rate * m.now.Seconds(); asked < due {
				m.want(m.standing("a", 1, Demand), int64(due-asked)+1)
				asked += float64(int64(due-asked) + 1)
			}
			m.contend(m.now)
			for _, g := range m.step(m.now + time.Millisecond) {
				got[g.real.Flow.Class().Name] += float64(g.got)
				if g.real.Flow.Class().Name != "a" {
					m.want(g.real, 64<<10)
				} else if left := g.want - g.got; left > 0 {
					m.want(g.real, left)
				}
			}
			m.now += 100 * time.Microsecond
		}
		for class, part := range c.want {
			if n := got[class] / m.rate / 5; n < part-0.06-part*0.05 || n > part+0.06+part*0.05 {
				t.Errorf("a takes %.1f of the rate: %s gets %.3f, not %.3f", c.top, class, n, part)
			}
		}
	}
}

// TestUnused: what does not come is given to others, and is not charged.
func TestUnused(t *testing.T) {
	m := newSim(t, 1e7, onlineBatch)
	a, b := m.standing("online", 1, Demand), m.standing("online", 2, Demand)
	used := map[Standing]int64{}
	m.want(a, 64<<10)
	m.want(b, 64<<10)
	for m.now < 10*time.Second {
		for _, g := range m.step(10 * time.Second) {
			n := g.got
			if g.real == a {
				n /= 10
				m.unused(g.charge, g.got-n, m.now)
			}
			used[g.real] += n
			m.want(g.real, 64<<10)
		}
	}
	if got := float64(used[a] + used[b]); !about(got, 1e8, 1e6) {
		t.Errorf("%.0f bytes came in 10 s, not 100 MB", got)
	}
	if !about(float64(used[a]), float64(used[b]), 1e6) {
		t.Errorf("the flows got %d and %d bytes", used[a], used[b])
	}
	if q := m.status("", 0, 1, m.now); q.Classes[0].Total != used[a]+used[b] {
		t.Errorf("%d bytes are counted, %d came", q.Classes[0].Total, used[a]+used[b])
	}
}

// TestFlowsAreForgotten: a queue remembers only who wants something.
func TestFlowsAreForgotten(t *testing.T) {
	m := newSim(t, 1e9, onlineBatch)
	for i := range 4000 {
		m.want(m.standing("batch", i, Rank(i%3)), 1)
		m.now += 5 * time.Millisecond
		m.run(m.now)
	}
	known := func() (n int) {
		for _, s := range m.shares {
			for _, l := range s.levels {
				n += len(l.accounts)
			}
		}
		return n
	}
	if n := known(); n > 600 {
		t.Errorf("%d flows are remembered of those of the last second, which were 200", n)
	}
	m.forget(m.now + 2*forgetAfter)
	if n := known(); n != 0 {
		t.Errorf("%d flows are remembered that want nothing", n)
	}
}
