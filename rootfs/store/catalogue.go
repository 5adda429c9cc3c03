package store

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// OpenImage opens the image that img describes, with the sources that this
// handle's reads use, in the order of preference. Bootstrap and tables are kept
// on disk whatever Config.Keep says, so that LoadImage finds them after a
// restart; img.Bootstrap is not held. It fails with ErrInvalidArgument when img
// is not what Validate accepts, and with ErrFailedPrecondition when the manifest
// is open with another index.
func (s *Store) OpenImage(ctx context.Context, img *index.Image, sources []Source) (*Image, error) {
	if err := errors.Join(ctx.Err(), img.Validate()); err != nil {
		return nil, fmt.Errorf("open image %s: %w", img.Manifest, err)
	}
	i, err := s.makeImage(img, sources)
	if s.awaitRoom(ctx, err) {
		i, err = s.makeImage(img, sources)
	}
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", img.Manifest, err)
	}
	return i, nil
}

func (s *Store) makeImage(img *index.Image, sources []Source) (*Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := newRecord(img)
	if err := s.persist(&r, img); err != nil {
		return nil, err
	}
	i, err := s.openImage(r, img.Segments)
	if err != nil {
		return nil, err
	}
	return s.newImage(i, sources), nil
}

// LoadImage opens an image that OpenImage has opened before, perhaps in an
// earlier process. It fails with ErrNotFound when the store does not have it or
// has lost parts of what describes it.
func (s *Store) LoadImage(ctx context.Context, manifest digest.Digest, sources []Source) (*Image, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("load image %s: %w", manifest, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[manifest]
	if s.closed {
		return nil, fmt.Errorf("load image %s: %w", manifest, os.ErrClosed)
	}
	if !ok {
		return nil, fmt.Errorf("load image %s: %w", manifest, errdefs.ErrNotFound)
	}
	segments, err := s.loadIndex(&r)
	if err != nil {
		s.log.Warn("image cannot be loaded; it has to be opened from its index again", "image", manifest, "err", err)
		return nil, fmt.Errorf("load image %s: what describes it is damaged (%s): %w", manifest, err.Error(), errdefs.ErrNotFound)
	}
	i, err := s.openImage(r, segments)
	if err != nil {
		return nil, fmt.Errorf("load image %s: %w", manifest, err)
	}
	return s.newImage(i, sources), nil
}

// OpenSegment opens one segment without an image, for as long as the handle is
// open: GC and Remove leave it alone.
func (s *Store) OpenSegment(ctx context.Context, seg *index.Segment, sources []Source) (*Segment, error) {
	if seg.Table == nil {
		return nil, fmt.Errorf("open segment %s: it has no table: %w", seg.ID, errdefs.ErrInvalidArgument)
	}
	if err := errors.Join(ctx.Err(), seg.Table.Validate()); err != nil {
		return nil, fmt.Errorf("open segment %s: %w", seg.ID, err)
	}
	if got := seg.Table.ID(); got != seg.ID {
		return nil, fmt.Errorf("open segment %s: its table has the digest %s: %w", seg.ID, got, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	g, err := s.useSegment(seg.ID, seg.Table)
	if err != nil {
		return nil, fmt.Errorf("open segment %s: %w", seg.ID, err)
	}
	h := s.newHandle("segment "+seg.ID.String(), sources)
	desc := *seg
	h.views = []view{{h: h, seg: g, desc: &desc}}
	h.drop = func() { s.unuseSegment(g) }
	return &Segment{h: h}, nil
}

// persist writes what LoadImage needs. The record comes last and makes the image
// exist. Nothing is synced, to start fast: loadIndex checks every byte, and what
// a crash of the machine took is opened from its index again. Precondition: mu
// is held.
func (s *Store) persist(r *record, img *index.Image) error {
	if s.closed {
		return os.ErrClosed
	}
	if old, ok := s.records[r.Manifest]; ok {
		if old.equal(r) {
			return errors.Join(s.repair(r, img), s.putHints(&old, r))
		}
		if s.images[r.Manifest] != nil {
			return fmt.Errorf("it is open with another index; close it everywhere first: %w", errdefs.ErrFailedPrecondition)
		}
		if err := s.remove(&old, r); err != nil {
			return fmt.Errorf("replace its index: %w", err)
		}
	}
	for k := range img.Segments {
		g := &img.Segments[k]
		if err := s.dir.put(s.dir.segment(g.ID, tableFile), index.EncodeTable(g.Table)); err != nil {
			return err
		}
	}
	if err := s.dir.put(s.dir.image(r.Manifest, bootFile), img.Bootstrap); err != nil {
		return err
	}
	return s.putRecord(r)
}

func (s *Store) putRecord(r *record) error {
	data, err := encodeRecord(r)
	if err != nil {
		return err
	}
	if err := s.dir.put(s.dir.image(r.Manifest, recordFile), data); err != nil {
		return err
	}
	s.records[r.Manifest] = *r
	return nil
}

// putHints writes the record r in the place of old, which differs at most in
// hints. Handles that are open keep the old ones.
func (s *Store) putHints(old, r *record) error {
	if old.sameHints(r) {
		return nil
	}
	return s.putRecord(r)
}

// repair writes again what is damaged of an image that is not open.
func (s *Store) repair(r *record, img *index.Image) error {
	if s.images[r.Manifest] != nil {
		return nil
	}
	if _, err := s.loadIndex(r); err == nil {
		return nil
	}
	delete(s.records, r.Manifest)
	return s.persist(r, img)
}

// loadIndex reads the tables of an image and checks its bootstrap.
func (s *Store) loadIndex(r *record) ([]index.Segment, error) {
	if i := s.images[r.Manifest]; i != nil {
		return i.index, nil
	}
	if err := s.checkBootstrap(r); err != nil {
		return nil, err
	}
	var out []index.Segment
	off := r.BootSize
	for _, g := range r.Segments {
		t, err := s.loadTable(g.ID)
		if err != nil {
			return nil, err
		}
		if t.Size != g.Size {
			return nil, fmt.Errorf("segment %s has %d bytes, its image says %d: %w", g.ID, t.Size, g.Size, errdefs.ErrDataLoss)
		}
		out = append(out, index.Segment{ID: g.ID, Layer: g.Layer, Off: off, Table: t, Prefetch: g.Prefetch})
		off += g.Size
	}
	return out, nil
}

// putTable makes sure that the table of an open segment is on disk.
func (s *Store) putTable(g *segment) error {
	if s.hasAny(g.id, tableFile) {
		return nil
	}
	return s.dir.put(s.dir.segment(g.id, tableFile), index.EncodeTable(g.table))
}

func (s *Store) checkBootstrap(r *record) error {
	f, err := os.Open(s.dir.image(r.Manifest, bootFile))
	if err != nil {
		return err
	}
	defer f.Close() // only read
	got, err := r.Bootstrap.Algorithm().FromReader(f)
	if err == nil && got != r.Bootstrap {
		err = fmt.Errorf("bootstrap has another digest: %w", errdefs.ErrDataLoss)
	}
	return err
}

func (s *Store) loadTable(id index.ID) (*index.Table, error) {
	if g := s.segments[id]; g != nil {
		return g.table, nil
	}
	data, err := os.ReadFile(s.dir.segment(id, tableFile))
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(data) != id {
		return nil, fmt.Errorf("table of segment %s has another digest: %w", id, errdefs.ErrDataLoss)
	}
	return index.DecodeTable(data)
}
