package store

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

func twoClasses(t *testing.T) (s *sched.Scheduler, online, batch *sched.Flow) {
	t.Helper()
	s, err := sched.New(sched.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return s, s.Flow("online", "pod"), s.Flow("batch", "job")
}

func work(f *sched.Flow, r sched.Rank) *sched.Work {
	return sched.NewWork(sched.Standing{Flow: f, Rank: r})
}

// queue puts work into the line of m and returns its place there.
func (m *memory) queue(w *sched.Work, n int64) *reservation {
	r := &reservation{size: 1 << classOf(n), work: w, ready: make(chan struct{})}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.line.waiting = append(m.line.waiting, r)
	m.grant()
	return r
}

func (r *reservation) granted() bool {
	select {
	case <-r.ready:
		return true
	default:
		return false
	}
}

// Whatever lesser levels hold, there is room for those above.
func TestMemoryKeepsRoom(t *testing.T) {
	s, online, batch := twoClasses(t)
	const mib = 1 << 20
	m := newMemory(16*mib, s)
	kinds := []struct {
		flow *sched.Flow
		rank sched.Rank
		most int // of 1 MiB, together with those before
	}{
		{batch, sched.Background, 4}, {batch, sched.Demand, 8}, {online, sched.Prefetch, 14}, {online, sched.Demand, 16},
	}
	var all []*reservation
	held := 0
	for _, k := range kinds {
		var last *reservation
		for last = m.queue(work(k.flow, k.rank), mib); last.granted(); last = m.queue(work(k.flow, k.rank), mib) {
			held++
			all = append(all, last)
		}
		if held != k.most {
			t.Errorf("%d MiB are held after %s of %s, want %d", held, k.rank, k.flow.Class().Name, k.most)
		}
		if !m.giveUp(last) {
			t.Error("it is not in the line")
		}
	}
	if m.inUse() != 16*mib {
		t.Errorf("%d bytes in use", m.inUse())
	}
	for _, r := range all {
		m.release(r)
	}
	if m.inUse() != 0 || m.line.held != [levels]int64{} {
		t.Errorf("%d bytes in use, held %v", m.inUse(), m.line.held)
	}
}

// A level that has nothing gets a buffer, however large; then it waits. Copies make way.
func TestMemoryLargeChunks(t *testing.T) {
	s, online, batch := twoClasses(t)
	m := newMemory(1<<20, s)
	m.put(blockKey{}, make([]byte, 1<<19), 0)
	var all []*reservation
	for _, k := range []*sched.Work{work(batch, sched.Prefetch), work(batch, sched.Demand), work(online, sched.Prefetch), work(nil, sched.Demand)} {
		r := m.queue(k, 16<<20)
		if !r.granted() {
			t.Error("the first of its level waits")
		}
		second := m.queue(k, 1)
		if second.granted() {
			t.Error("a second one gets a buffer")
		}
		all = append(all, r, second)
	}
	if len(m.blocks) > 0 {
		t.Error("a copy does not make way")
	}
	for i := 0; i < len(all); i += 2 {
		m.release(all[i])
	}
	for i := 1; i < len(all); i += 2 {
		if !all[i].granted() {
			t.Error("nobody gets what was given back")
			continue
		}
		m.release(all[i])
	}
}

// Work that is promoted while it waits takes the room that is kept.
func TestMemoryPromotion(t *testing.T) {
	s, online, batch := twoClasses(t)
	m := newMemory(1<<20, s)
	first := m.queue(work(batch, sched.Prefetch), 1<<18)
	w := work(batch, sched.Prefetch)
	r := m.queue(w, 1<<18)
	if !first.granted() || r.granted() {
		t.Fatal("a quarter is not a quarter")
	}
	w.Promote(sched.Standing{Flow: online})
	m.look()
	if !r.granted() || r.level != 0 {
		t.Error("promoted work waits")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.reserve(ctx, 1<<18, work(batch, sched.Prefetch)); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
	m.release(r)
	m.release(first)
	if m.inUse() != 0 || len(m.line.waiting) > 0 {
		t.Errorf("%d bytes in use, %d wait", m.inUse(), len(m.line.waiting))
	}
}

// Everybody gets memory in the end, whatever the others do.
func TestMemoryRandom(t *testing.T) {
	s, online, batch := twoClasses(t)
	m := newMemory(1<<20, s)
	var wg sync.WaitGroup
	for g := range uint64(12) {
		rnd := rand.New(rand.NewPCG(1, g))
		wg.Go(func() {
			for range 300 {
				w := work([]*sched.Flow{online, batch, nil}[rnd.IntN(3)], sched.Rank(rnd.IntN(3)))
				ctx, cancel := context.WithCancel(context.Background())
				if rnd.IntN(4) == 0 {
					go cancel()
				}
				r, err := m.reserve(ctx, 1+rnd.Int64N(1<<18), w)
				cancel()
				if err != nil {
					continue
				}
				if rnd.IntN(4) == 0 {
					w.Promote(sched.Standing{Flow: online})
					m.look()
				}
				if int64(len(*r.bytes)) < r.size {
					t.Errorf("a buffer of %d bytes for %d", len(*r.bytes), r.size)
				}
				m.release(r)
			}
		})
	}
	wg.Wait()
	if m.inUse() != 0 || len(m.line.waiting) > 0 || m.line.held != [levels]int64{} {
		t.Errorf("%d bytes in use, %d wait, held %v", m.inUse(), len(m.line.waiting), m.line.held)
	}
}
