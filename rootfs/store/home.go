package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// tenancy is the content of a .home file: the segment's bytes are in the .erofs
// file of an image, which was complete and durable before this was written.
type tenancy struct {
	Version int           `json:"version"`
	Image   digest.Digest `json:"image"` // manifest
}

// openHome finds the segment's bytes on disk, or makes an empty file for them.
// Precondition: Store.mu is held and nobody else has the segment.
func (g *segment) openHome() error {
	h, err := g.openTenancy()
	if err == nil {
		g.moveTo(h, nil, true)
		g.dirty.Store(false)
		return nil
	}
	dir, id := g.s.dir, g.id
	if !errors.Is(err, fs.ErrNotExist) {
		g.s.log.Warn("segment is not where it was; its own file counts", "segment", id, "err", err)
	}
	if err := remove(dir.segment(id, homeFile)); err != nil {
		return err
	}
	f, err := os.OpenFile(dir.segment(id, dataFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	g.home.Store(&home{file: f, own: true})
	if err := g.loadBits(f); err != nil {
		return errors.Join(err, f.Close())
	}
	g.account()
	return nil
}

// hasBytes says whether the disk may have bytes of the segment.
func (s *Store) hasBytes(id index.ID) bool { return s.hasAny(id, dataFile, homeFile) }

// hasAny says whether the segment has a file with one of the suffixes.
func (s *Store) hasAny(id index.ID, suffixes ...string) bool {
	for _, suffix := range suffixes {
		if _, err := os.Stat(s.dir.segment(id, suffix)); err == nil {
			return true
		}
	}
	return false
}

// openTenancy opens the image file that the segment has moved to. Any error
// means that there is none to rely on.
func (g *segment) openTenancy() (*home, error) {
	data, err := os.ReadFile(g.s.dir.segment(g.id, homeFile))
	if err != nil {
		return nil, err
	}
	t, err := decodeTenancy(data)
	if err != nil {
		return nil, err
	}
	return g.s.homeIn(t.Image, g)
}

func decodeTenancy(data []byte) (tenancy, error) {
	var t tenancy
	if err := json.Unmarshal(data, &t); err != nil || t.Version != 1 {
		return t, fmt.Errorf("read home of segment: unknown content: %w", errdefs.ErrDataLoss)
	}
	return t, nil
}

// homeIn opens the image's complete file as home of one of its segments. It
// fails with ErrNotExist when there is no such file. Precondition: mu is held.
func (s *Store) homeIn(manifest digest.Digest, g *segment) (*home, error) {
	r, ok := s.records[manifest]
	if !ok {
		return nil, fmt.Errorf("image %s: %w", manifest, fs.ErrNotExist)
	}
	off, ok := r.offset(g.id)
	if !ok {
		return nil, fmt.Errorf("image %s does not have the segment: %w", manifest, errdefs.ErrDataLoss)
	}
	f, err := os.Open(s.dir.image(manifest, wholeFile))
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || st.Size() != r.size() {
		_ = f.Close() // only read
		return nil, fmt.Errorf("file of image %s has another size than %d: %w", manifest, r.size(), errors.Join(errdefs.ErrDataLoss, err))
	}
	return &home{file: f, off: off}, nil
}

// loadBits takes over the bits that were flushed for the data file f. A file of
// another size than the segment's has no past, nor has one whose bits are
// damaged: it starts empty.
func (g *segment) loadBits(f *os.File) error {
	name := g.s.dir.segment(g.id, bitsFile)
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() == g.table.Size {
		bits, err := readBits(name, len(g.table.Chunks))
		if err == nil {
			g.adopt(bits)
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			g.s.log.Warn("segment is fetched again", "segment", g.id, "err", err)
		}
	}
	if err := remove(name); err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil { // gaps between chunks have to be zeros
		return err
	}
	return f.Truncate(g.table.Size)
}

func readBits(name string, n int) (bitmap, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return decodeBits(data, n)
}

// adopt takes over bits that were flushed. Precondition: nobody else has the
// segment.
func (g *segment) adopt(bits bitmap) {
	for i := range g.table.Chunks {
		if bits.has(i) {
			g.setPresent(i)
			g.durable.set(i)
		}
	}
	g.dirty.Store(false)
}

// errUnsynced says that the disk did not take the data.
var errUnsynced = errors.New("data could not be synced")

// flush makes durable what was kept so far: first the data, then the bits that
// were set before the data was synced.
func (g *segment) flush() {
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	if !g.dirty.Swap(false) {
		return
	}
	err := g.flushBits()
	g.account()
	if err == nil {
		return
	}
	g.dirty.Store(true)
	g.s.full(err, false)
	if !errors.Is(err, errUnsynced) { // which drop has reported
		g.s.log.Warn("what was fetched may be fetched again after a restart", "segment", g.id, "err", err)
	}
}

// flushBits does flush's work. Precondition: flushMu is held.
func (g *segment) flushBits() error {
	bits := g.ownBits() // before the sync that covers them
	h := g.home.Load()
	if h == nil || !h.own {
		return nil
	}
	if err := g.s.syncFile(h.file); err != nil {
		g.drop(err)
		return fmt.Errorf("%w: %w", errUnsynced, err)
	}
	g.durable.add(bits)
	if err := g.writeLinks(); err != nil { // before the bits of chunks that are linked now go
		return err
	}
	return g.s.dir.write(g.s.dir.segment(g.id, bitsFile), encodeBits(bits, len(g.table.Chunks)))
}

// ownBits copies the bits of the chunks that are in home.
func (g *segment) ownBits() bitmap {
	g.mu.Lock()
	defer g.mu.Unlock()
	bits, l := g.bits.clone(), g.links.Load()
	if l != nil {
		for i := range l.at {
			if l.at[i].Load() != 0 {
				bits.clear(i)
			}
		}
	}
	return bits
}

// drop makes absent every own chunk that no sync has covered, after one failed: the
// kernel takes pages that it could not write for clean, so that sooner or later
// they read as zeros, and the next sync succeeds without them. The epoch changes
// after the bits, so whoever saw one of these bits finds another epoch when its
// pread is done and reads again. What cannot be helped are preads that end
// before the kernel reports the failure here. Precondition: flushMu is held.
func (g *segment) drop(err error) {
	n := int64(0)
	g.mu.Lock()
	for i := range g.table.Chunks {
		if g.owns(i) && !g.durable.has(i) {
			g.setAbsent(i)
			n++
		}
	}
	g.lost.Add(1)
	g.nextEpoch()
	g.mu.Unlock()
	g.s.dropped.Store(true)
	g.s.stats.keepFailures.Add(n)
	g.s.stats.dropLogged.Do(func() {
		g.s.log.Error("disk fails; what it lost is fetched again", "segment", g.id, "chunks", n, "dir", g.s.cfg.Dir, "err", err)
	})
}
