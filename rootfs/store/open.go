package store

import (
	"fmt"
	"os"

	"github.com/tatami-containers/tatami/rootfs/index"
)

func (s *Store) newImage(i *image, sources []Source) *Image {
	h := s.newHandle("image "+i.record.Manifest.String(), sources)
	for k, g := range i.segments {
		h.views = append(h.views, view{h: h, seg: g, desc: &i.index[k], read: g.newRead()})
	}
	h.drop = func() { s.releaseImage(i) }
	return &Image{h: h, image: i, size: i.record.size()}
}

// openImage opens or shares an image that is on disk. Precondition: mu is held.
func (s *Store) openImage(r record, segments []index.Segment) (_ *image, err error) {
	if i := s.images[r.Manifest]; i != nil {
		i.refs++
		return i, nil
	}
	i := &image{record: r, refs: 1, building: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			s.closeImage(i)
		}
	}()
	if i.boot, err = os.Open(s.dir.image(r.Manifest, bootFile)); err != nil {
		return nil, err
	}
	for _, desc := range segments {
		g, err := s.useSegment(desc.ID, desc.Table)
		if err != nil {
			return nil, err
		}
		desc.Table = g.table
		i.segments, i.index = append(i.segments, g), append(i.index, desc)
		delete(s.ingested, g.id)
	}
	if err := s.rehome(i); err != nil { // they are where they were
		s.log.Warn("segments cannot move into the image's file", "image", r.Manifest, "err", err)
	}
	s.images[r.Manifest] = i
	return i, nil
}

// releaseImage gives one reference back. Precondition: mu is held.
func (s *Store) releaseImage(i *image) {
	if i.refs--; i.refs == 0 {
		delete(s.images, i.record.Manifest)
		s.closeImage(i)
	}
}

func (s *Store) closeImage(i *image) {
	for _, g := range i.segments {
		s.unuseSegment(g)
	}
	if i.boot != nil {
		_ = i.boot.Close() // only read
	}
}

// useSegment opens or shares a segment for someone who reads it.
// Precondition: as for openSegment.
func (s *Store) useSegment(id index.ID, t *index.Table) (*segment, error) {
	g, err := s.openSegment(id, t)
	if err != nil {
		return nil, err
	}
	if g.users++; g.users == 1 && s.cfg.Keep && g.home.Load().own {
		g.loadLinks()
	}
	return g, nil
}

// unuseSegment ends what useSegment began. Precondition: mu is held.
func (s *Store) unuseSegment(g *segment) {
	if g.users--; g.users == 0 {
		g.flush()
		s.retry()
		for _, t := range g.dropLinks() {
			if t != g {
				s.releaseSegment(t)
			}
		}
	}
	s.releaseSegment(g)
}

// openSegment opens or shares a segment. Precondition: mu is held, and id is the
// digest of t, which is valid.
func (s *Store) openSegment(id index.ID, t *index.Table) (*segment, error) {
	if s.closed {
		return nil, os.ErrClosed
	}
	if g := s.segments[id]; g != nil {
		g.refs++
		return g, nil
	}
	g := newSegment(s, id, t)
	g.endLeft() // before any byte may go
	if s.cfg.Keep {
		g.use = s.useOf(id, t.Size)
		if err := g.openHome(); err != nil {
			return nil, fmt.Errorf("segment %s: %w", id, err)
		}
	}
	g.refs = 1
	s.segments[id] = g
	return g, nil
}

// release gives one reference back, taking mu.
func (s *Store) release(g *segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseSegment(g)
}

// releaseSegment gives one reference back. Precondition: mu is held.
func (s *Store) releaseSegment(g *segment) {
	if g.refs--; g.refs == 0 {
		delete(s.segments, g.id)
		g.close()
	}
}
