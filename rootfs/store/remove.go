package store

import (
	"cmp"
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

// ImageInfo describes one image of the store.
type ImageInfo struct {
	Manifest     digest.Digest
	Size         int64 // bytes
	Open         bool
	Materialized bool            // a complete file exists
	Layers       []digest.Digest // blobs that its segments come from; some may be there twice
}

// Images lists the images that LoadImage would find, by manifest.
func (s *Store) Images() []ImageInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]ImageInfo, 0, len(s.records))
	for m, r := range s.records {
		i := ImageInfo{Manifest: m, Size: r.size(), Open: s.images[m] != nil, Materialized: s.hasWhole(&r)}
		for _, g := range r.Segments {
			i.Layers = append(i.Layers, g.Layer)
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b ImageInfo) int { return cmp.Compare(a.Manifest, b.Manifest) })
	return out
}

// Remove removes an image and the segments that no other image and no open
// handle uses. It fails with ErrNotFound when the store does not have it, and
// with ErrFailedPrecondition while it is open.
func (s *Store) Remove(manifest digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[manifest]
	switch {
	case !ok:
		return fmt.Errorf("remove image %s: %w", manifest, errdefs.ErrNotFound)
	case s.images[manifest] != nil:
		return fmt.Errorf("remove image %s: it is open; unmount it first: %w", manifest, errdefs.ErrFailedPrecondition)
	}
	if err := s.remove(&r, nil); err != nil {
		return fmt.Errorf("remove image %s: %w", manifest, err)
	}
	return nil
}

// remove removes the image of r; the segments of next, which is about to take
// its place, stay. The record goes first, so that a crash leaves no image with
// parts missing, and bits go before the data that they speak of.
// Precondition: mu is held and the image is not open.
func (s *Store) remove(r, next *record) error {
	used := s.used(r.Manifest)
	if next != nil {
		for _, g := range next.Segments {
			used[g.ID] = true
		}
	}
	defer s.setLeaving(nil)
	plan, err := s.planRemoval(r, used)
	if err != nil {
		return err
	}
	for _, g := range r.Segments {
		if used[g.ID] || len(plan.need[g.ID]) > 0 || s.segments[g.ID] != nil {
			if err := s.moveOut(r, g.ID, used[g.ID], plan.need[g.ID]); err != nil {
				return err
			}
		}
	}
	delete(s.records, r.Manifest)
	err = remove(s.dir.image(r.Manifest, recordFile), s.dir.image(r.Manifest, bootFile), s.dir.image(r.Manifest, wholeFile))
	if err == nil {
		s.usage.setWhole(r.Manifest, 0)
	}
	for id := range plan.retire {
		err = errors.Join(err, s.retire(id, plan.need[id]))
	}
	return err
}

// removeSegment removes the files of a segment that is not open.
// Precondition: mu is held.
func (s *Store) removeSegment(id index.ID) error {
	if t, err := s.loadTable(id); err == nil {
		for i := range t.Chunks {
			s.known.forget(id, t, i)
		}
	}
	delete(s.ingested, id)
	s.forgetUse(id)
	return remove(s.dir.segment(id, bitsFile), s.dir.segment(id, homeFile), s.dir.segment(id, dataFile),
		s.dir.segment(id, linksFile), s.dir.segment(id, useFile), s.dir.segment(id, tableFile))
}

// used returns the segments that something other than the given image needs, not
// counting links.
func (s *Store) used(except digest.Digest) map[index.ID]bool {
	out := map[index.ID]bool{}
	for m, r := range s.records {
		if m == except {
			continue
		}
		for _, g := range r.Segments {
			out[g.ID] = true
		}
	}
	for id, g := range s.segments {
		if g.users > 0 {
			out[id] = true
		}
	}
	return out
}

// GC removes the segments that no image and no open handle uses, except those
// that this process has ingested and that may still become part of an image. It
// returns how many bytes of disk their files took.
func (s *Store) GC() (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found, err := stems(s.dir.segments())
	if err != nil {
		return 0, fmt.Errorf("collect unused segments: %w", err)
	}
	used := s.used("")
	maps.Copy(used, s.ingested)
	unused := map[index.ID]bool{}
	for stem := range found {
		if id := digest.NewDigestFromEncoded(digest.SHA256, stem); !used[id] {
			unused[id] = true
		}
	}
	s.setLeaving(unused)
	defer s.setLeaving(nil)
	need, err := s.needed(used)
	if err != nil {
		return 0, fmt.Errorf("collect unused segments: %w", err)
	}
	freed := int64(0)
	for id := range unused {
		n := diskUsage(s.dir.segment(id, dataFile))
		if err := s.retire(id, need[id]); err != nil {
			return freed, fmt.Errorf("collect unused segment %s: %w", id, err)
		}
		freed += n - diskUsage(s.dir.segment(id, dataFile))
	}
	return freed, nil
}

// moveOut gives a segment that lives in the file of the image of r, which is
// about to go, a home in another image's file or a file of its own: all of it when
// it is used, else the chunks that others need. Precondition: mu is held.
func (s *Store) moveOut(r *record, id index.ID, used bool, need []int) error {
	t, err := s.loadTable(id)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errdefs.ErrDataLoss) {
		return nil // nobody can open the segment; it will be fetched again
	}
	if err != nil {
		return err
	}
	g, err := s.openSegment(id, t)
	if err != nil {
		return err
	}
	defer s.releaseSegment(g)
	h := g.home.Load() // changes only under mu
	if h == nil || h.own || !sameFile(h.file, s.dir.image(r.Manifest, wholeFile)) {
		return nil
	}
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	for m := range s.records {
		if m != r.Manifest && s.settleInImage(m, g) == nil {
			return nil
		}
	}
	if !used {
		g.keepOnly(need)
	}
	f, err := os.CreateTemp(s.dir.temp(), "segment-")
	if err != nil {
		return err
	}
	have := g.ownBits()
	return g.settleIn(f, have, g.copyOwn(f, h, have))
}

// copyOwn copies the chunks of have from h to the file f.
func (g *segment) copyOwn(f *os.File, h *home, have bitmap) error {
	err := f.Truncate(g.table.Size)
	if err == nil && g.missing.Load() == 0 {
		return copyRange(f, 0, h.file, h.off, g.table.Size)
	}
	for i, c := range g.table.Chunks {
		if err != nil {
			return err
		}
		if have.has(i) {
			err = copyData(f, c.Off, h.file, h.off+c.Off, c.Len)
		}
	}
	return err
}

// settleIn makes the file f, still in tmp, which has the chunks of have, the
// segment's own file, unless err says that it is no good. Precondition: Store.mu
// and flushMu are held.
func (g *segment) settleIn(f *os.File, have bitmap, err error) error {
	dir, data := g.s.dir, g.s.dir.segment(g.id, dataFile)
	if err == nil {
		err = f.Sync()
	}
	if err == nil { // bits of an older file do not speak of this one
		err = remove(dir.segment(g.id, bitsFile))
	}
	if err = dir.place(f, data, err); err != nil {
		return err
	}
	own, err := os.OpenFile(data, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	g.moveTo(&home{file: own, own: true}, have, true)
	if err := g.flushBits(); err != nil {
		return err
	}
	return remove(dir.segment(g.id, homeFile))
}

func sameFile(f *os.File, name string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(name)
	return err == nil && os.SameFile(a, b)
}
