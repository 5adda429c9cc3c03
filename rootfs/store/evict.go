package store

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// evictExtents makes the own chunks of some extents of one segment absent and gives
// their disk back, except chunks that links of segments in use lead to. It returns
// how many bytes of disk that brought. Only the class that yields reads the segment
// itself when it begins, or nobody; who has it open, or opens it meanwhile, finds the
// chunks absent, and fetches of them wait (segment.filling) until the disk has been
// given back, so that no hole is made where a chunk has come back.
func (s *Store) evictExtents(extents []victim) (int64, error) {
	g, gone, err := s.beginEviction(extents)
	if g == nil || err != nil {
		return 0, err
	}
	defer s.endEviction(g)
	defer g.flushMu.Unlock()
	defer g.filling.Unlock()
	before := g.use.disk.Load()
	if err := g.forgetDurably(); err != nil {
		return 0, fmt.Errorf("segment %s: %w", g.id, err)
	}
	s.noteGone(g, extents)
	g.punch(gone)
	return before - g.use.disk.Load(), nil
}

// beginEviction makes the chunks that may go absent in memory. The segment is nil
// when it is in use by now; else it is open once more and the caller has its flushMu
// and filling.
func (s *Store) beginEviction(extents []victim) (*segment, bitmap, error) {
	id := extents[0].id
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.keepShares || s.busy()[id] {
		return nil, nil, nil
	}
	t, err := s.loadTable(id)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errdefs.ErrDataLoss) {
		return nil, nil, s.removeSegment(id) // nobody can open it
	}
	if err != nil {
		return nil, nil, err
	}
	s.setLeaving(map[index.ID]bool{id: true})
	defer s.setLeaving(nil) // then its bits say that there is nothing to link to
	need, err := s.needed(s.inUse())
	if err != nil {
		return nil, nil, err
	}
	g, err := s.openSegment(id, t)
	if err != nil {
		return nil, nil, err
	}
	g.flushMu.Lock()
	if !g.home.Load().own {
		g.flushMu.Unlock()
		s.releaseSegment(g)
		return nil, nil, nil
	}
	g.filling.Lock()
	return g, g.leave(g.inExtents(extents), need[id]), nil
}

// endEviction gives back what beginEviction has opened, and removes it when the last
// image that had it was removed meanwhile.
func (s *Store) endEviction(g *segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseSegment(g)
	if !g.retired || s.closed || s.segments[g.id] != nil {
		return
	}
	stay := s.used("")
	maps.Copy(stay, s.ingested)
	if stay[g.id] {
		return
	}
	s.setLeaving(map[index.ID]bool{g.id: true})
	defer s.setLeaving(nil)
	need, err := s.needed(stay)
	if err == nil {
		err = s.retire(g.id, need[g.id])
	}
	if err != nil {
		s.log.Warn("segment is left until the store is collected", "segment", g.id, "err", err)
	}
}

// inExtents returns the chunks that begin in some extents.
func (g *segment) inExtents(extents []victim) bitmap {
	in := map[int64]bool{}
	for _, v := range extents {
		in[int64(v.n)] = true
	}
	out := newBitmap(len(g.table.Chunks))
	for i, c := range g.table.Chunks {
		if in[c.Off/g.s.usage.extent] {
			out.set(i)
		}
	}
	return out
}

// leave makes chunks absent except those of need, and returns those of them that
// are not in the segment's own file any more, absent before or not. Precondition:
// flushMu and filling are held, and no link is being made to the segment.
func (g *segment) leave(chunks bitmap, need []int) (gone bitmap) {
	for _, i := range need {
		if i < len(g.table.Chunks) {
			chunks.clear(i)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.table.Chunks {
		if !chunks.has(i) {
			continue
		}
		g.durable.clear(i)
		g.s.known.forget(g.id, g.table, i)
		if g.owns(i) {
			g.setAbsent(i)
		}
	}
	g.lost.Add(1)
	g.nextEpoch()
	return chunks
}

// forgetDurably makes durable that chunks are absent, before their bytes go. When the
// disk is too full even for a new bitmap, the old one goes: a crash then costs all of
// the segment and not its truth. Precondition: flushMu is held.
func (g *segment) forgetDurably() error {
	g.dirty.Store(false)
	err := g.flushBits()
	if err == nil {
		return nil
	}
	g.dirty.Store(true)
	if isFull(err) {
		return remove(g.s.dir.segment(g.id, bitsFile))
	}
	return err
}

// noteGone says that extents went.
func (s *Store) noteGone(g *segment, extents []victim) {
	u := s.usage
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, v := range extents {
		u.clock.Evict(&g.use.extents[v.n])
	}
	u.changed[g.id] = true
}

// evictWhole removes the complete file of an image that nobody has open. First the
// segments that live there lose their home, durably. Whoever has the file itself
// open reads on.
func (s *Store) evictWhole(manifest digest.Digest) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.keepShares || !s.wholeMayGo(manifest, s.busy()) { // opened meanwhile
		return 0, nil
	}
	if lent, err := s.lends(manifest, s.inUse()); lent || err != nil {
		return 0, err
	}
	for _, r := range s.records[manifest].Segments {
		if err := s.evictTenant(manifest, r.ID); err != nil {
			return 0, err
		}
	}
	name := s.dir.image(manifest, wholeFile)
	n := diskUsage(name)
	if err := remove(name); err != nil {
		return 0, err
	}
	s.usage.setWhole(manifest, 0)
	return n, nil
}

// lends says whether links of segments in use lead to segments of an image.
// Precondition: mu is held.
func (s *Store) lends(manifest digest.Digest, used map[index.ID]bool) (bool, error) {
	need, err := s.needed(used)
	return slices.ContainsFunc(s.records[manifest].Segments, func(g recordSegment) bool { return len(need[g.ID]) > 0 }), err
}

// evictTenant makes a segment that lives in the complete file of an image have
// nothing. Precondition: mu is held and the segment is not open.
func (s *Store) evictTenant(manifest digest.Digest, id index.ID) error {
	name := s.dir.segment(id, homeFile)
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if t, err := decodeTenancy(data); err == nil && t.Image != manifest {
		return nil
	}
	if t, err := s.loadTable(id); err == nil {
		for i := range t.Chunks {
			s.known.forget(id, t, i)
		}
	}
	return remove(name)
}
