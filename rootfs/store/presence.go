package store

import (
	"errors"

	"github.com/tatami-containers/tatami/rootfs/store/shared"
)

// Which chunks are there changes only here and, for links, in setLink; so the
// state file that readers in other processes look at ([shared]) always follows. It
// speaks of own chunks only. All that follows has the precondition that mu is held,
// or that nobody else has the segment yet.

// mark makes chunk i present. Precondition: its bytes are in home or its link is
// set.
func (g *segment) mark(i int) {
	if !g.bits.set(i) {
		return
	}
	g.missing.Add(-g.table.Chunks[i].Len)
	if g.state != nil && !g.linked(i) {
		g.state.Set(i)
	}
}

// setPresent makes chunk i present, which is not on disk yet. Precondition: as for
// mark.
func (g *segment) setPresent(i int) {
	if !g.bits.has(i) {
		g.mark(i)
		g.dirty.Store(true)
	}
}

// setAbsent makes the present chunk i absent. nextEpoch follows, with mu still held,
// and before the bytes may go.
func (g *segment) setAbsent(i int) {
	g.bits.clear(i)
	g.missing.Add(g.table.Chunks[i].Len)
	g.hide(i)
}

// hide says to other processes that chunk i is not, or soon not any more, in home.
// nextEpoch follows as for setAbsent.
func (g *segment) hide(i int) {
	if g.state != nil {
		g.state.Clear(i)
	}
}

// nextEpoch makes whoever reads present chunks at this moment look again.
func (g *segment) nextEpoch() {
	g.epoch.Add(1)
	if g.state != nil {
		g.state.Bump()
	}
}

// takeState ends the state file, if there is one, and returns it for closeState.
// Precondition: flushMu is held too.
func (g *segment) takeState(end func(*shared.State)) *shared.State {
	st := g.state
	if st != nil {
		end(st)
		g.state = nil
	}
	return st
}

// endState ends the state file of a segment that is closed. While the store keeps
// shares it lives on, until the segment is opened again: without that, none of its
// bytes goes. Precondition: Store.mu is held and nobody has the segment.
func (g *segment) endState() {
	if !g.s.keepShares {
		g.closeState(g.takeState((*shared.State).Kill))
	} else if g.state != nil {
		g.s.left[g.id] = g.takeState(func(*shared.State) {})
	}
}

// endLeft ends the state file that endState has left of a segment that is opened
// again. Precondition: Store.mu is held.
func (g *segment) endLeft() {
	if st := g.s.left[g.id]; st != nil {
		delete(g.s.left, g.id)
		st.Kill()
		g.closeState(st)
	}
}

// KeepShares says that the process is about to end and that another one will open
// the store: what was shared can be read on until then, also what is closed from
// now on.
func (s *Store) KeepShares() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keepShares = true
}

// leaveShares forgets the state files that live on. Precondition: the store is
// closed.
func (s *Store) leaveShares() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, st := range s.left {
		errs = append(errs, st.Leave())
	}
	clear(s.left)
	return errors.Join(errs...)
}

func (g *segment) closeState(st *shared.State) {
	if st == nil {
		return
	}
	if err := st.Close(); err != nil {
		g.s.log.Warn("state file is left until the store is opened again", "segment", g.id, "err", err)
	}
}
