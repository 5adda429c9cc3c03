package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Materialize makes the complete image one local file, fetching what is missing,
// and returns its name. The file stays until the image is removed and is never
// written again. Its segments then live in it: their own files are removed, so
// that the disk holds them once; a segment that lives in another image's file
// already is copied, or shares its blocks where the filesystem can. While it
// copies, the disk holds the image twice unless blocks are shared.
//
// A restart finds the steps that were done: the file gets its name only when it
// is complete and synced, each segment then its .home record, and only after
// that its own files go.
func (i *Image) Materialize(ctx context.Context) (string, error) {
	if err := i.Fill(ctx); err != nil {
		return "", err
	}
	if !i.Complete() {
		return "", fmt.Errorf("materialize %s: bytes are missing: %w", i.h.what, errdefs.ErrUnavailable)
	}
	select {
	case i.image.building <- struct{}{}:
		defer func() { <-i.image.building }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	s := i.h.s
	name := s.dir.image(i.Manifest(), wholeFile)
	if !s.hasWhole(&i.image.record) {
		if err := i.build(ctx, name); err != nil {
			return "", fmt.Errorf("materialize %s: %w", i.h.what, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.rehome(i.image); err != nil {
		return "", fmt.Errorf("materialize %s: %w", i.h.what, err)
	}
	return name, nil
}

// build writes the file of the complete image.
func (i *Image) build(ctx context.Context, name string) error {
	f, err := os.CreateTemp(i.h.s.dir.temp(), "image-")
	if err != nil {
		return err
	}
	err = f.Truncate(i.size)
	if err == nil {
		err = copyRange(f, 0, i.image.boot, 0, i.image.record.BootSize)
	}
	for k, g := range i.image.segments {
		if err = errors.Join(err, ctx.Err(), i.h.ctx.Err()); err != nil {
			break
		}
		err = g.copyTo(f, i.image.index[k].Off)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = i.h.s.dir.place(f, name, err); err == nil {
		i.h.s.usage.setWhole(i.Manifest(), diskUsage(name))
	}
	return err
}

// copyTo copies the complete segment to f at off, once more when chunks went, or
// moved to another segment, meanwhile.
func (g *segment) copyTo(f *os.File, off int64) error {
	for range maxTries {
		epoch := g.epoch.Load() // before anything is read
		err := g.copyOnce(f, off)
		if err != nil && !errors.Is(err, errAgain) {
			return err
		}
		if err == nil && g.epoch.Load() == epoch {
			return nil
		}
	}
	return fmt.Errorf("segment %s changes all the time: %w", g.id, errdefs.ErrUnavailable)
}

// copyOnce does copyTo's work. The segment is flushed first, so that what the disk
// has lost is not copied as zeros.
func (g *segment) copyOnce(f *os.File, off int64) error {
	g.flush()
	g.checkLinks()
	if n := g.missing.Load(); n > 0 {
		return fmt.Errorf("segment %s: %d bytes are missing: %w", g.id, n, errdefs.ErrUnavailable)
	}
	src, h, err := g.dup()
	if err != nil {
		return err
	}
	return errors.Join(copyRange(f, off, src, h.off, g.table.Size), src.Close(), g.copyLinked(f, off))
}

// copyLinked copies the chunks that are not in the segment's own file.
func (g *segment) copyLinked(f *os.File, off int64) error {
	var buf []byte
	for i, c := range g.table.Chunks {
		if !g.linked(i) {
			continue
		}
		if int64(len(buf)) < c.Len {
			buf = make([]byte, c.Len)
		}
		if err := g.pread(buf[:c.Len], c.Off); err != nil {
			return err
		}
		if _, err := f.WriteAt(buf[:c.Len], off+c.Off); err != nil {
			return err
		}
	}
	return nil
}

// dup opens the segment's home once more, so that it can be read for long while
// the segment moves.
func (g *segment) dup() (*os.File, *home, error) {
	g.flushMu.Lock() // its home stays open meanwhile
	defer g.flushMu.Unlock()
	h := g.home.Load()
	fd, err := unix.FcntlInt(h.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open segment %s once more: %w", g.id, err)
	}
	return os.NewFile(uintptr(fd), h.file.Name()), h, nil
}

// rehome moves the segments of an image whose complete file exists into that
// file, except those that live in another image's. It is also how a restart goes
// on with what Materialize began. Precondition: mu is held.
func (s *Store) rehome(i *image) error {
	if !s.cfg.Keep {
		return nil
	}
	if !s.hasWhole(&i.record) {
		return nil
	}
	for _, g := range i.segments {
		if err := s.moveIn(i, g); err != nil {
			return fmt.Errorf("move segment %s: %w", g.id, err)
		}
	}
	return nil
}

// hasWhole says whether the image's complete file exists. Another size is not
// of our making: Materialize then writes the file again.
func (s *Store) hasWhole(r *record) bool {
	st, err := os.Stat(s.dir.image(r.Manifest, wholeFile))
	return err == nil && st.Size() == r.size()
}

func (s *Store) moveIn(i *image, g *segment) error {
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	if g.home.Load().own {
		if err := s.settleInImage(i.record.Manifest, g); err != nil {
			return err
		}
	}
	return s.dropOwn(g)
}

// settleInImage makes the complete file of an image the home of a segment.
// Precondition: mu and the segment's flushMu are held.
func (s *Store) settleInImage(manifest digest.Digest, g *segment) error {
	h, err := s.homeIn(manifest, g)
	if err != nil {
		return err
	}
	data, err := json.Marshal(tenancy{Version: 1, Image: manifest})
	if err == nil {
		err = s.dir.write(s.dir.segment(g.id, homeFile), data)
	}
	if err != nil {
		return errors.Join(err, h.file.Close())
	}
	g.moveTo(h, nil, true)
	return nil
}

// dropOwn removes the files that a segment had before it moved.
func (s *Store) dropOwn(g *segment) error {
	return remove(s.dir.segment(g.id, bitsFile), s.dir.segment(g.id, dataFile), s.dir.segment(g.id, linksFile))
}
