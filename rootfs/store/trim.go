package store

import (
	"errors"
	"io/fs"
	"maps"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// needed lists for each segment which of its chunks the given segments read
// through links. Precondition: mu is held.
func (s *Store) needed(by map[index.ID]bool) (map[index.ID][]int, error) {
	out := map[index.ID][]int{}
	for id := range by {
		targets, err := s.linksOf(id)
		if err != nil {
			return nil, err
		}
		for _, t := range targets {
			for _, p := range t.pairs {
				out[t.id] = append(out[t.id], int(p.target))
			}
		}
	}
	return out, nil
}

// linksOf returns the links of a segment: those in memory while it has users, else
// those on disk. Precondition: mu is held.
func (s *Store) linksOf(id index.ID) ([]linkTarget, error) {
	if g := s.segments[id]; g != nil && g.users > 0 {
		return g.linkFile().targets, nil
	}
	f, err := s.readLinks(id, -1)
	if errors.Is(err, errdefs.ErrDataLoss) || err == nil && f == nil {
		return nil, nil // as whoever opens the segment will find
	}
	if err != nil {
		return nil, err
	}
	return f.targets, nil
}

// removal is what becomes of segments when an image goes.
type removal struct {
	retire map[index.ID]bool  // those that nothing uses any more, linked ones included
	need   map[index.ID][]int // what others read of them
}

// planRemoval finds out what removing the image of r takes, when used is what
// others use. No link to what goes is made until setLeaving(nil).
// Precondition: mu is held.
func (s *Store) planRemoval(r *record, used map[index.ID]bool) (p removal, err error) {
	stay := maps.Clone(used)
	maps.Copy(stay, s.ingested)
	p.retire = map[index.ID]bool{}
	for _, g := range r.Segments {
		if used[g.ID] {
			continue
		}
		p.retire[g.ID] = true
		targets, err := s.linksOf(g.ID)
		if err != nil {
			return p, err
		}
		for _, t := range targets {
			if !stay[t.id] {
				p.retire[t.id] = true
			}
		}
	}
	s.setLeaving(p.retire)
	p.need, err = s.needed(stay)
	return p, err
}

// retire removes a segment that nothing uses, or cuts it down to the chunks that
// others read through links. Precondition: mu is held.
func (s *Store) retire(id index.ID, need []int) error {
	if len(need) > 0 {
		return s.trim(id, need)
	}
	if g := s.segments[id]; g != nil {
		g.retired = true // a fetch looks at it just now, then GC comes again; or it makes way
		return nil
	}
	return s.removeSegment(id)
}

// trim cuts a segment without users down to the chunks that others need. Its bits
// are durable before the bytes of the other chunks go. In the file of an image
// that stays there is nothing to gain. Precondition: mu is held.
func (s *Store) trim(id index.ID, need []int) error {
	t, err := s.loadTable(id)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errdefs.ErrDataLoss) {
		return s.removeSegment(id) // no link leads to what cannot be opened
	}
	if err != nil {
		return err
	}
	if err := remove(s.dir.segment(id, linksFile)); err != nil {
		return err
	}
	g, err := s.openSegment(id, t)
	if err != nil {
		return err
	}
	defer s.releaseSegment(g)
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	if !g.home.Load().own {
		return nil
	}
	gone := g.keepOnly(need)
	if g.dirty.Load() {
		if err := g.flushBits(); err != nil {
			return err
		}
	}
	g.punch(gone)
	return nil
}

// keepOnly makes all chunks absent but the needed ones and returns them.
// Precondition: flushMu is held, and the segment has no users.
func (g *segment) keepOnly(need []int) (gone bitmap) {
	keep := newBitmap(len(g.table.Chunks))
	for _, i := range need {
		if i < len(g.table.Chunks) {
			keep.set(i)
		}
	}
	gone = newBitmap(len(g.table.Chunks))
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.table.Chunks {
		if keep.has(i) {
			continue
		}
		gone.set(i)
		g.durable.clear(i)
		g.s.known.forget(g.id, g.table, i)
		if g.bits.has(i) {
			g.setAbsent(i)
			g.dirty.Store(true)
		}
	}
	g.lost.Add(1)
	g.nextEpoch()
	return gone
}
