package store

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// links says which chunks of a segment are read from the file of a target,
// another segment or the same, that has them itself. What a link says is true for
// ever, because the tables of both say that the chunks are equal; whether the
// target has the chunk at present, its bit says, which every read looks at.
type links struct {
	targets atomic.Pointer[[]*segment] // grows, with Store.mu and segment.mu held; a list that was loaded does not change
	at      []atomic.Uint64            // for each chunk: number of the target plus one, and in the low 32 bits the chunk there; 0 is none
}

// get returns where chunk i is; t is nil when it is not linked.
func (l *links) get(i int) (t *segment, chunk int) {
	if l == nil {
		return nil, 0
	}
	v := l.at[i].Load() // before the targets: that of a link is among them
	if v == 0 {
		return nil, 0
	}
	return l.target(int(v>>32 - 1)), int(uint32(v))
}

func (l *links) target(n int) *segment { return (*l.targets.Load())[n] }

// linked says whether chunk i is read from a target.
func (g *segment) linked(i int) bool {
	t, _ := g.links.Load().get(i)
	return t != nil
}

// owns says whether the segment has chunk i in its own home.
func (g *segment) owns(i int) bool { return g.isPresent(i) && !g.linked(i) }

// borrow calls link, which makes a link of g to chunk j of t, with g.mu held. It
// fails when t does not have the chunk, or is about to lose those that no link is
// known to lead to.
func (g *segment) borrow(t *segment, j int, link func()) error {
	g.s.linking.RLock()
	defer g.s.linking.RUnlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	if t != g && g.s.leaving[t.id] || !t.owns(j) {
		return fmt.Errorf("chunk %d of segment %s is gone: %w", j, t.id, errdefs.ErrNotFound)
	}
	link()
	return nil
}

// setLeaving says which segments no link may be made to from now on; all that
// were made before are seen by needed. Precondition: Store.mu is held.
func (s *Store) setLeaving(ids map[index.ID]bool) {
	s.linking.Lock()
	defer s.linking.Unlock()
	s.leaving = ids
}

// setLink makes chunk i present by reading chunk j of target n. Precondition:
// Store.linking and mu are held, and the chunks are equal.
func (g *segment) setLink(i, n, j int) {
	g.hide(i)
	g.links.Load().at[i].Store(uint64(n+1)<<32 | uint64(uint32(j)))
	g.relinked.Store(true)
	g.dirty.Store(true)
	g.setPresent(i)
	g.s.stats.sharedChunks.Add(1)
	g.s.stats.sharedBytes.Add(g.table.Chunks[i].Len)
}

// unlink makes chunk i absent if it is linked to chunk j of t still. The bit goes
// first, and the epoch changes before the link goes, so that a reader who saw the
// bit and no link finds another epoch. It waits for flushMu, because share, which
// holds it, punches the chunks that it has linked: none of them may be fetched into
// the file before that is done.
func (g *segment) unlink(i int, t *segment, j int) {
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.links.Load()
	if now, k := l.get(i); now != t || k != j {
		return
	}
	g.setAbsent(i)
	g.nextEpoch()
	l.at[i].Store(0)
	g.relinked.Store(true)
	g.dirty.Store(true)
}

// checkLinks makes chunks absent whose targets have lost them.
func (g *segment) checkLinks() {
	l := g.links.Load()
	if l == nil {
		return
	}
	for i := range l.at {
		if t, j := l.get(i); t != nil && !t.owns(j) {
			g.unlink(i, t, j)
		}
	}
}

// targetNumber returns the number that a target has in the links, or -1.
func (l *links) targetNumber(id index.ID) int {
	if l != nil {
		for n, t := range *l.targets.Load() {
			if t.id == id {
				return n
			}
		}
	}
	return -1
}

// target returns the number of a segment of the store as target of g's links,
// opening it for as long as g has users.
func (g *segment) target(id index.ID) (int, error) {
	if n := g.links.Load().targetNumber(id); n >= 0 {
		return n, nil
	}
	g.s.mu.Lock()
	defer g.s.mu.Unlock()
	return g.addTarget(id)
}

// addTarget does target's work. Precondition: Store.mu is held and g has users.
func (g *segment) addTarget(id index.ID) (int, error) {
	l := g.links.Load()
	if n := l.targetNumber(id); n >= 0 {
		return n, nil
	}
	t := g
	if id != g.id {
		var err error
		if t, err = g.s.openTarget(id); err != nil {
			return 0, err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if l == nil {
		l = &links{at: make([]atomic.Uint64, len(g.table.Chunks))}
		l.targets.Store(&[]*segment{t})
		g.links.Store(l)
		return 0, nil
	}
	more := append(slices.Clone(*l.targets.Load()), t)
	l.targets.Store(&more)
	return len(more) - 1, nil
}

// openTarget opens a segment that chunks are read from, if it has a past. Its
// table is made to be on disk, without which a restart could not follow a link.
// Precondition: mu is held.
func (s *Store) openTarget(id index.ID) (*segment, error) {
	if g := s.segments[id]; g != nil {
		if err := s.putTable(g); err != nil {
			return nil, err
		}
		g.refs++
		return g, nil
	}
	t, err := s.loadTable(id)
	if err != nil {
		return nil, err
	}
	if !s.hasBytes(id) {
		return nil, fmt.Errorf("segment %s has no bytes on disk: %w", id, errdefs.ErrNotFound)
	}
	return s.openSegment(id, t)
}

// dropLinks forgets the links, which are on disk if that took them, and returns
// the targets, which the caller releases. Precondition: Store.mu is held and g
// has no users.
func (g *segment) dropLinks() []*segment {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.links.Load()
	if l == nil {
		return nil
	}
	for i := range l.at {
		if t, _ := l.get(i); t != nil {
			g.setAbsent(i)
		}
	}
	g.nextEpoch()
	g.links.Store(nil)
	return *l.targets.Load()
}

// loadLinks takes over the links that were flushed, those whose targets have
// their chunks. Precondition: Store.mu is held and g has just got its first user.
func (g *segment) loadLinks() {
	f, err := g.s.readLinks(g.id, len(g.table.Chunks))
	if err != nil || f == nil {
		if err != nil {
			g.s.log.Warn("links of segment are lost; what they led to is fetched again", "segment", g.id, "err", err)
		}
		return
	}
	for _, of := range f.targets {
		n, err := g.addTarget(of.id)
		if err != nil {
			g.s.log.Warn("segment that another is linked to is gone; its chunks are fetched again", "segment", g.id, "target", of.id, "err", err)
			continue
		}
		g.takeLinks(n, of.pairs)
	}
}

func (g *segment) takeLinks(n int, pairs []linkPair) {
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.links.Load().target(n)
	for _, p := range pairs {
		i, j := int(p.chunk), int(p.target)
		if g.bits.has(i) || !sameChunk(g.table, i, t.table, j) || !t.owns(j) {
			continue
		}
		g.links.Load().at[i].Store(uint64(n+1)<<32 | uint64(p.target))
		g.mark(i)
	}
}

// sameChunk says whether chunk i of a and chunk j of b, which need not exist, are
// the same bytes.
func sameChunk(a *index.Table, i int, b *index.Table, j int) bool {
	return j < len(b.Chunks) && sharable(a, i) && a.Algorithm == b.Algorithm &&
		a.Chunks[i].Len == b.Chunks[j].Len && a.Chunks[i].Sum == b.Chunks[j].Sum
}
