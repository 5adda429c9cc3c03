package sched

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  Config
		want string // in the error; "" is none
	}{
		{name: "nothing said"},
		{name: "all said", cfg: Config{Classes: []Class{{Name: "a", Share: 1, Floor: Rate{Percent: 20}, Ceiling: Rate{Percent: 30}}}, Default: "a", Link: 1e9}},
		{name: "no name", cfg: Config{Classes: []Class{{Share: 1}}}, want: "needs a name"},
		{name: "no share", cfg: Config{Classes: []Class{{Name: "a"}}}, want: "share 0"},
		{name: "large share", cfg: Config{Classes: []Class{{Name: "a", Share: 1e7}}}, want: "share 10000000"},
		{name: "twice", cfg: Config{Classes: []Class{{Name: "a", Share: 1}, {Name: "a", Share: 2}}}, want: "twice"},
		{name: "unknown default", cfg: Config{Default: "gold"}, want: `default class "gold"`},
		{name: "NaN", cfg: Config{Classes: []Class{{Name: "a", Share: 1, Floor: Rate{Percent: math.NaN()}}}}, want: "0 to 100 per cent"},
		{name: "negative", cfg: Config{Classes: []Class{{Name: "a", Share: 1, Ceiling: Rate{Bytes: -1}}}}, want: "bytes a second"},
		{name: "both", cfg: Config{Classes: []Class{{Name: "a", Share: 1, Ceiling: Rate{Bytes: 1, Percent: 1}}}}, want: "bytes a second"},
		{name: "floor above ceiling", cfg: Config{Classes: []Class{{Name: "a", Share: 1, Floor: Rate{Percent: 30}, Ceiling: Rate{Percent: 20}}}}, want: "above the ceiling"},
		{name: "floors beyond the link", cfg: Config{Link: 100, Classes: []Class{{Name: "a", Share: 1, Floor: Rate{Percent: 60}}, {Name: "b", Share: 1, Floor: Rate{Bytes: 60}}}}, want: "120% of the link"},
		{name: "floors beyond any link", cfg: Config{Classes: []Class{{Name: "a", Share: 1, Floor: Rate{Percent: 60}}, {Name: "b", Share: 1, Floor: Rate{Percent: 60}}}}, want: "120% of the link"},
		{name: "negative link", cfg: Config{Link: -1}, want: "have it measured"},
		{name: "many", cfg: Config{Classes: make([]Class, 17)}, want: "at most 16"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := New(c.cfg)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

// TestNil: without a scheduler everything passes, and a context that has ended is an
// error as with one.
func TestNil(t *testing.T) {
	var s *Scheduler
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, q := range []*Slots{s.CPU(), s.Disk(), s.Relay()} {
		leave, err := q.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		leave()
		leave()
		if _, err := q.Enter(ended); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	}
	u := s.Upstream("h")
	end, err := u.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	end()
	u.Uses(nil)()
	g, err := u.Receive(t.Context(), 1<<30)
	if err != nil || g.N != 1<<30 {
		t.Errorf("%d bytes, %v", g.N, err)
	}
	u.Received(g, 5)
	if _, err := u.Receive(ended, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	f := s.Flow("online", "1")
	if f.ID() != "1" || f.Class().Name != "" || len(s.Status().Queues) != 0 {
		t.Errorf("flow %q of class %q", f.ID(), f.Class().Name)
	}
	var none *Flow
	if none.ID() != "" || none.Class().Fill {
		t.Error("a nil flow has properties")
	}
	var w *Work
	if w.Promote(Standing{}) || w.Standing() != (Standing{}) {
		t.Error("nil work was promoted")
	}
	w.Set(Standing{})
}

// TestOfOtherSchedulers: a flow that a scheduler does not know counts as no flow.
func TestOfOtherSchedulers(t *testing.T) {
	many := mustNew(t, Config{Classes: []Class{{Name: "x", Share: 1}, {Name: "y", Share: 1}, {Name: "z", Share: 1}}})
	s := mustNew(t, Config{Classes: onlineBatch, Default: "batch"})
	var none *Scheduler
	for _, f := range []*Flow{many.Flow("z", "1"), many.Flow("x", "1"), none.Flow("online", "1"), nil} {
		leave, err := s.CPU().Enter(With(t.Context(), NewWork(Standing{Flow: f})))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		leave()
	}
	if st := s.Status().Queues[1]; st.Name != "cpu" || st.Classes[0].Total != 0 || st.Classes[1].Total == 0 {
		t.Errorf("%+v", st)
	}
}

func TestFlow(t *testing.T) {
	s := mustNew(t, Config{Classes: onlineBatch, Default: "batch"})
	a := s.Flow("online", "1")
	if s.Flow("online", "1") != a || s.Flow("batch", "1") == a || s.Flow("online", "2") == a {
		t.Error("flows are not told apart by class and sandbox")
	}
	if s.Flow("gold", "1") != s.Flow("batch", "1") {
		t.Error("an unknown class does not count as the default class")
	}
	for i := range 1000 {
		s.Flow("online", fmt.Sprint("gone ", i))
	}
	known := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.flows)
	}
	for range 500 { // the collector takes its time to call cleanups
		runtime.GC()
		if known() <= 10 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := known(); n > 10 {
		t.Errorf("%d flows are known, of which 1 is used", n)
	}
	if s.Flow("online", "1") != a {
		t.Error("a flow in use was forgotten")
	}
	runtime.KeepAlive(a)
}

func TestBefore(t *testing.T) {
	s := mustNew(t, Config{Classes: onlineBatch})
	on, batch := s.Flow("online", "1"), s.Flow("batch", "1")
	order := []Standing{{on, Demand}, {on, Prefetch}, {batch, Demand}, {batch, Prefetch}, {on, Background}, {batch, Background}}
	for i, a := range order {
		for j, b := range order {
			if a.Before(b) != (i < j) {
				t.Errorf("%v before %v: %v", a, b, a.Before(b))
			}
		}
	}
	if (Standing{s.Flow("online", "2"), Demand}).Before(order[0]) || (Standing{nil, Demand}).Before(order[0]) {
		t.Error("equals come before each other")
	}
}

func TestHostsAreBounded(t *testing.T) {
	s := mustNew(t, Config{})
	busy := s.Upstream("busy")
	end, err := busy.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 * maxHosts {
		s.Upstream(fmt.Sprint("host ", i))
	}
	if n := len(s.hosts); n > maxHosts {
		t.Errorf("%d hosts are known", n)
	}
	if s.Upstream("busy") != busy {
		t.Error("a host in use was forgotten")
	}
	var ends []func()
	for i := range 2 * maxHosts {
		end, err := s.Upstream(fmt.Sprint("host ", i)).Begin(With(t.Context(), NewWork(Standing{Flow: s.Flow("online", "1")})))
		if err != nil {
			t.Fatal(err)
		}
		if ends = append(ends, end); len(ends) >= maxHosts+requestsPerHost-1 {
			break // the others share what one host has
		}
	}
	if n := len(s.hosts); n > maxHosts || s.other == nil {
		t.Errorf("%d hosts are known in use", n)
	}
	if n := len(s.Status().Queues); n > 4+2*maxHosts+2 {
		t.Errorf("the status has %d queues", n)
	}
	for _, end := range append(ends, end) {
		end()
	}
	for _, u := range s.hosts {
		u.used = -time.Hour
	}
	if n := len(s.Status().Queues); n != 6 {
		t.Errorf("the status has %d queues when no host is in use", n)
	}
}

// TestSharedWorkIsPromoted: all goroutines that wait with a piece of work go first when
// it is promoted, wherever they wait, and each once.
func TestSharedWorkIsPromoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t, Config{Classes: onlineBatch, Link: 1e6})
		online, batch := s.Flow("online", "1"), s.Flow("batch", "1")
		u := s.Upstream("h")
		var mu sync.Mutex
		var order []string
		wait := func(name string, w *Work) {
			g, err := u.Receive(With(t.Context(), w), 16<<10)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			order = append(order, name)
			mu.Unlock()
			u.Received(g, g.N)
		}
		go wait("first", NewWork(Standing{batch, Demand})) // takes what may be taken at once
		synctest.Wait()
		for range 20 {
			go wait("batch", NewWork(Standing{batch, Demand}))
			synctest.Wait()
		}
		shared := NewWork(Standing{batch, Background})
		for range 5 {
			go wait("shared", shared)
			synctest.Wait()
		}
		if !shared.Promote(Standing{online, Demand}) || shared.Promote(Standing{batch, Demand}) {
			t.Error("the wrong promotion succeeded")
		}
		st := s.Status().Queues[0]
		if st.Classes[0].Waiting != [3]int{5} || st.Classes[1].Waiting != [3]int{20} || st.Classes[0].Promoted != 5 {
			t.Errorf("%+v", st)
		}
		time.Sleep(10 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		if want := slices.Concat([]string{"first"}, slices.Repeat([]string{"shared"}, 5), slices.Repeat([]string{"batch"}, 20)); !slices.Equal(order, want) {
			t.Errorf("order %v", order)
		}
		shared.mu.Lock()
		defer shared.mu.Unlock()
		if n := len(shared.waits); n != 0 {
			t.Errorf("%d waits are left", n)
		}
	})
}

// TestFirstComeFirstServed: a scheduler that is off has one order, whatever the class.
func TestFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustNew(t, Config{Classes: onlineBatch, Off: true, Link: 1000})
		u := s.Upstream("h")
		for range 100 {
			g, err := u.Receive(t.Context(), 1<<20) // has no bound
			if err != nil || g.N == 0 {
				t.Fatalf("%d bytes, %v", g.N, err)
			}
			u.Received(g, g.N)
		}
		cpu := newSlots("cpu", 1, s)
		var mu sync.Mutex
		var order, want []int
		for i := range 30 {
			go func() {
				class := onlineBatch[(i+1)%2].Name
				leave, err := cpu.Enter(With(t.Context(), NewWork(Standing{s.Flow(class, "1"), Rank(i % 3)})))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				time.Sleep(time.Millisecond)
				leave()
			}()
			synctest.Wait()
			want = append(want, i)
		}
		time.Sleep(time.Second)
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(order, want) {
			t.Errorf("order %v", order)
		}
		if st := cpu.status(); st.Classes[0].Total != 15_000 || st.Classes[1].Total != 15_000 {
			t.Errorf("%+v", st)
		}
	})
}

// TestCancel: who gives up has taken nothing, also when it was granted something just
// then, and nobody waits for it.
func TestCancel(t *testing.T) {
	s := mustNew(t, Config{Classes: onlineBatch, Link: 1 << 26})
	cpu := newSlots("cpu", 2, s)
	u := s.Upstream("h")
	var received, turns atomic.Int64
	var wg sync.WaitGroup
	works := make([]*Work, 8)
	for i := range works {
		works[i] = NewWork(Standing{s.Flow(onlineBatch[i%2].Name, fmt.Sprint(i%3)), Rank(i % 3)})
	}
	for i := range 16 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 9))
			for range 200 {
				ctx, cancel := context.WithTimeout(With(t.Context(), works[r.IntN(len(works))]), time.Duration(r.Int64N(int64(3*time.Millisecond))))
				works[r.IntN(len(works))].Set(Standing{s.Flow(onlineBatch[r.IntN(2)].Name, "x"), Rank(r.IntN(3))})
				if g, err := u.Receive(ctx, 64<<10); err == nil {
					n := r.IntN(g.N + 1)
					received.Add(int64(n))
					u.Received(g, n)
				}
				if leave, err := cpu.Enter(ctx); err == nil {
					if turns.Add(1) > 2 {
						t.Error("three turns of two")
					}
					runtime.Gosched()
					turns.Add(-1)
					leave()
					leave()
				}
				if end, err := u.Begin(ctx); err == nil {
					end()
					end()
				}
				cancel()
			}
		})
	}
	wg.Wait()
	for _, q := range []*rateQueue{u.rate, u.link} {
		if e := &q.est; q.pace.waiting != 0 || e.waiting != 0 || e.held != 0 || e.out != 0 || e.engaged != 0 {
			t.Errorf("%s: left behind are %d tickets, %+v", q.name, q.pace.waiting, e)
		}
		sum := int64(0)
		for _, c := range q.status().Classes {
			sum += c.Total
		}
		if sum != received.Load() {
			t.Errorf("%s: %d bytes are counted, %d were received", q.name, sum, received.Load())
		}
	}
	for _, q := range []*Slots{cpu, u.requests} {
		if q.turns.used != 0 || q.turns.low != 0 || q.turns.waiting != 0 {
			t.Errorf("%s: left behind are %d turns and %d tickets", q.name, q.turns.used, q.turns.waiting)
		}
	}
	for i, w := range works {
		if len(w.waits) != 0 {
			t.Errorf("work %d still waits", i)
		}
	}
}

// TestCancelledTurnIsPassedOn: a turn that was granted to somebody who gave up goes to
// the next one.
func TestCancelledTurnIsPassedOn(t *testing.T) {
	s := mustNew(t, Config{Classes: onlineBatch})
	q := newSlots("q", 1, s)
	leave, err := q.Enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	gone := &ticket{queue: q, want: 1}
	q.turns.put(gone, Standing{}, q.clock())
	got := make(chan func())
	go func() {
		leave, err := q.Enter(t.Context())
		if err != nil {
			t.Error(err)
		}
		got <- leave
	}()
	for q.status().Classes[0].Waiting[Demand] < 2 {
		time.Sleep(time.Millisecond)
	}
	leave() // gone has the turn now
	if gone.got == 0 {
		t.Fatal("who came first has no turn")
	}
	q.cancel(gone)
	(<-got)()
	if q.turns.used != 0 {
		t.Errorf("%d turns are left behind", q.turns.used)
	}
}

func TestRankOf(t *testing.T) {
	ctx := t.Context()
	if RankOf(ctx) != Demand {
		t.Error("a context has a rank of its own")
	}
	ctx = WithRank(WithRank(ctx, Background), Prefetch)
	if r := RankOf(ctx); r != Background {
		t.Errorf("rank %v: a rank was raised", r)
	}
}

// BenchmarkReceive is one grant of two queues while 1,000 others wait.
func BenchmarkReceive(b *testing.B) {
	m := newSim(b, 1e9, onlineBatch)
	for i := range 1000 {
		m.want(m.standing(onlineBatch[i%2].Name, i%50, Rank(i%3)), 64<<10)
	}
	b.ReportAllocs()
	for b.Loop() {
		for _, t := range m.step(math.MaxInt64) {
			t.got, t.seq, t.ready = 0, 0, nil
			m.ask(t, t.real, m.now)
		}
	}
}

// BenchmarkAlone is what a reader pays for each read while nobody else wants anything.
func BenchmarkAlone(b *testing.B) {
	s := mustNew(b, Config{})
	u := s.Upstream("h")
	ctx := With(b.Context(), NewWork(Standing{Flow: s.Flow("online", "1")}))
	b.ReportAllocs()
	for b.Loop() {
		g, err := u.Receive(ctx, 64<<10)
		if err != nil {
			b.Fatal(err)
		}
		u.Received(g, g.N)
	}
}
