package store

import (
	"context"
	"slices"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// line is where fetches wait for a buffer, and what those who have one hold. It is
// protected by memory.mu. In a level who came first goes first; there is room that
// those of lesser levels cannot take, so that whoever reads now does not wait for what
// somebody may want later, and the most important class not for the others. The bounds
// are for a level together with those below it:
//
//	level  fetches                       may hold of the memory
//	0      of the most important class   all
//	1        prefetch, background        7/8
//	2      of other classes              1/2
//	3        prefetch, background        1/4
//
// A level that holds nothing gets one buffer even when it is over its bound, so that
// none starves and chunks of any length are fetched.
type line struct {
	sched   *sched.Scheduler // who is important; immutable
	held    [levels]int64    // bytes
	waiting []*reservation   // in the order in which they came
}

const levels = 4

// bounds are those of levels, in eighths of the memory.
var bounds = [levels]int64{8, 7, 4, 2}

// reservation is the buffer of a fetch, or the wait for it.
type reservation struct {
	bytes *[]byte // nil while it waits
	size  int64
	work  *sched.Work
	level int           // that it was granted at
	ready chan struct{} // closed when it has a buffer
}

// reserve returns a buffer of at least n bytes for a fetch, waiting for room.
func (m *memory) reserve(ctx context.Context, n int64, w *sched.Work) (*reservation, error) {
	r := &reservation{size: 1 << classOf(n), work: w, ready: make(chan struct{})}
	m.mu.Lock()
	m.line.waiting = append(m.line.waiting, r)
	m.grant()
	m.mu.Unlock()
	select {
	case <-r.ready:
		return r, nil
	case <-ctx.Done():
	}
	if !m.giveUp(r) { // it was granted meanwhile
		m.release(r)
	}
	return nil, context.Cause(ctx)
}

// giveUp takes r out of the line; it is false when r is not there any more.
func (m *memory) giveUp(r *reservation) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.Index(m.line.waiting, r)
	if i < 0 {
		return false
	}
	m.line.waiting = slices.Delete(m.line.waiting, i, i+1)
	return true
}

// release gives back a fetch's buffer.
func (m *memory) release(r *reservation) {
	m.mu.Lock()
	m.used -= r.size
	m.line.held[r.level] -= r.size
	m.grant()
	m.mu.Unlock()
	m.recycle(r.bytes)
}

// look is for who has made work more urgent that may wait here.
func (m *memory) look() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.grant()
}

// grant gives buffers to those in the line for whom there is room. Precondition: mu
// is held.
func (m *memory) grant() {
	for level := range levels {
		for {
			r := m.line.first(level)
			if r == nil || !m.fits(level, r.size) {
				break
			}
			m.line.waiting = slices.DeleteFunc(m.line.waiting, func(w *reservation) bool { return w == r })
			m.used += r.size
			m.line.held[level] += r.size
			r.level, r.bytes = level, m.buffer(r.size)
			close(r.ready)
		}
	}
}

// fits says whether n bytes may be held at a level, and makes room for them.
// Precondition: mu is held.
func (m *memory) fits(level int, n int64) bool {
	below := int64(0)
	for _, held := range m.line.held[level:] {
		below += held
	}
	alone := m.line.held[level] == 0
	if below+n > m.limit/8*bounds[level] && !alone {
		return false
	}
	m.makeRoom(n)
	return m.used+n <= m.limit || alone
}

// first is who goes first of those that wait at a level, nil when none does.
func (l *line) first(level int) *reservation {
	for _, r := range l.waiting {
		if l.level(r.work.Standing()) == level {
			return r
		}
	}
	return nil
}

// level is that of a fetch of this standing.
func (l *line) level(s sched.Standing) int {
	level := 0
	if place, _ := l.sched.Place(s.Flow); place > 0 {
		level = 2
	}
	if s.Rank != sched.Demand {
		level++
	}
	return level
}
