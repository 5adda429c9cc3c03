package store

import (
	"errors"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store/replace"
)

// extentSize is what bytes are given up in: the chunks that begin in so many bytes
// of a segment go together. Of 1 TB of them, some 130,000, less than 4 MiB of memory
// are needed.
const extentSize = 8 << 20

// usage says what takes the disk. Entries are made and removed with Store.mu held.
type usage struct {
	extent int64        // length of an extent in bytes, immutable
	used   atomic.Int64 // bytes of disk of all segments and complete files

	mu       sync.Mutex
	clock    replace.Clock           // protected by mu, as all below
	segments map[index.ID]*use       // of which the disk may have bytes
	wholes   map[digest.Digest]int64 // bytes of disk of images' complete files
	changed  map[index.ID]bool       // segments whose extents are not in their files
}

// use is what the disk has of one segment, open or not, and how that was used.
type use struct {
	disk    atomic.Int64     // bytes of its own file: st_blocks, and what was kept since that was looked at
	extents []replace.Extent // protected by usage.mu
}

func newUsage(extent, quota int64) *usage {
	return &usage{
		extent: extent, clock: replace.Clock{Capacity: quota},
		segments: map[index.ID]*use{}, wholes: map[digest.Digest]int64{}, changed: map[index.ID]bool{},
	}
}

// add counts n bytes that were kept of a segment.
func (u *usage) add(g *use, n int64) {
	g.disk.Add(n)
	u.used.Add(n)
}

// count is how many extents a segment of size bytes has.
func (u *usage) count(size int64) int { return int((size + u.extent - 1) / u.extent) }

// of returns the use of a segment, reading what an earlier process knew of it the
// first time. size is that of the segment in bytes. Precondition: Store.mu is held.
func (s *Store) useOf(id index.ID, size int64) *use {
	u := s.usage
	u.mu.Lock()
	g := u.segments[id]
	u.mu.Unlock()
	if g != nil && len(g.extents) == u.count(size) {
		return g
	}
	if g != nil {
		s.forgetUse(id) // the file that it was of is not the segment's
	}
	g = &use{extents: s.readUse(id, u.count(size))}
	have, disk := make([]int64, len(g.extents)), diskUsage(s.dir.segment(id, dataFile))
	for i := range have {
		have[i] = g.extents[i].Bytes
	}
	u.spread(have, disk, size)
	u.mu.Lock()
	u.segments[id] = g
	u.mu.Unlock()
	u.set(id, g, disk, have)
	return g
}

// unsaid is what part of an extent a segment's disk may have more than its extents,
// besides what the filesystem needs itself, before that is looked for.
const unsaid = 16

// spread compares what the extents of a segment of size bytes have with its disk. When
// they have much less, as after a crash, which leaves bytes of which no bit speaks, or
// before there was a file that says what they have, the rest of the disk is taken to be
// spread over all: whoever gives them up finds out.
func (u *usage) spread(have []int64, disk, size int64) {
	for _, n := range have {
		disk -= n
	}
	if disk <= u.extent/unsaid {
		return
	}
	for i := range have {
		from := int64(i) * u.extent
		have[i] += int64(float64(disk) * float64(min(from+u.extent, size)-from) / float64(size))
	}
}

// forgetUse says that a segment's files are gone. Precondition: Store.mu is held.
func (s *Store) forgetUse(id index.ID) {
	u := s.usage
	u.mu.Lock()
	defer u.mu.Unlock()
	if g := u.segments[id]; g != nil {
		u.used.Add(-g.disk.Swap(0))
	}
	delete(u.segments, id)
	delete(u.changed, id)
}

// setWhole says how many bytes of disk the complete file of an image takes.
func (u *usage) setWhole(manifest digest.Digest, n int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.used.Add(n - u.wholes[manifest])
	u.wholes[manifest] = n
	if n == 0 {
		delete(u.wholes, manifest)
	}
}

// findWhole is setWhole for a file that was there, unless another is known.
func (u *usage) findWhole(manifest digest.Digest, n int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.wholes[manifest] == 0 && n > 0 {
		u.used.Add(n)
		u.wholes[manifest] = n
	}
}

// set corrects what is known of a segment: its disk, and what its extents have. It
// reports whether that was news.
func (u *usage) set(id index.ID, g *use, disk int64, have []int64) {
	u.used.Add(disk - g.disk.Swap(disk))
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range g.extents {
		if g.extents[i].Bytes != have[i] {
			g.extents[i].Bytes = have[i]
			u.changed[id] = true
		}
	}
}

// touch notes that a use which has read some extents of a segment ended.
func (u *usage) touch(id index.ID, g *use, read bitmap, now uint32, batch bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range g.extents {
		if read.has(i) {
			u.clock.Use(&g.extents[i], now, batch)
			u.changed[id] = true
		}
	}
}

// account looks at what the segment takes of the disk and where. Precondition:
// flushMu is held, or nobody else has the segment.
func (g *segment) account() {
	h := g.home.Load()
	if h == nil || g.use == nil {
		return
	}
	u := g.s.usage
	have, disk := make([]int64, len(g.use.extents)), int64(0)
	if h.own {
		disk = blocksOf(h.file)
		bits := g.ownBits()
		for i, c := range g.table.Chunks {
			if bits.has(i) {
				have[c.Off/u.extent] += index.RoundUp(c.End()) - index.RoundUp(c.Off)
			}
		}
	}
	u.spread(have, disk, g.table.Size)
	u.set(g.id, g.use, disk, have)
}

// blocksOf is how many bytes of disk an open file takes, 0 when it cannot be told.
func blocksOf(f *os.File) int64 {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	var st unix.Stat_t
	if conn.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }) != nil || err != nil {
		return 0
	}
	return st.Blocks * 512
}

// Kept is how many bytes of disk a segment of size bytes takes, open or not.
func (s *Store) Kept(id index.ID, size int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hasAny(id, homeFile) {
		return size
	}
	s.usage.mu.Lock()
	g := s.usage.segments[id]
	s.usage.mu.Unlock()
	if g == nil { // not known yet
		return diskUsage(s.dir.segment(id, dataFile))
	}
	return g.disk.Load()
}

// survey finds out what takes the disk after Open. It reads no table; it runs beside
// everything else.
func (s *Store) survey() {
	defer close(s.surveyed)
	found, err := stems(s.dir.segments())
	if err != nil {
		s.log.Warn("what takes the disk is not known", "dir", s.cfg.Dir, "err", err)
		return
	}
	for stem := range found {
		if s.ctx.Err() != nil {
			return
		}
		s.surveySegment(digest.NewDigestFromEncoded(digest.SHA256, stem))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for m, r := range s.records {
		n := diskUsage(s.dir.image(m, wholeFile))
		if n == 0 {
			continue
		}
		s.usage.findWhole(m, n)
		for _, g := range r.Segments { // how they were used is how the file was
			s.useOf(g.ID, g.Size)
		}
	}
}

// surveySegment makes a segment known that has bytes on disk.
func (s *Store) surveySegment(id index.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st, err := os.Stat(s.dir.segment(id, dataFile))
	switch {
	case err == nil && st.Size() > 0 && st.Size() <= index.MaxSegment:
		s.useOf(id, st.Size())
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		s.log.Warn("what a segment takes of the disk is not known", "segment", id, "err", err)
	}
}

// saveUses writes how segments were used, for the next process. Nothing is synced:
// what a crash takes is colder than it was, and no more.
func (s *Store) saveUses() {
	u := s.usage
	u.mu.Lock()
	ids := make([]index.ID, 0, len(u.changed))
	for id := range u.changed {
		ids = append(ids, id)
	}
	u.mu.Unlock()
	for _, id := range ids {
		if err := s.saveUse(id); err != nil {
			s.log.Debug("how a segment was used is not kept", "segment", id, "err", err)
		}
	}
}

func (s *Store) saveUse(id index.ID) error {
	s.mu.Lock() // it is not removed meanwhile
	defer s.mu.Unlock()
	u := s.usage
	u.mu.Lock()
	g := u.segments[id]
	if g == nil || !u.changed[id] {
		u.mu.Unlock()
		return nil
	}
	data := encodeUse(g.extents, u.extent)
	delete(u.changed, id)
	u.mu.Unlock()
	return s.dir.put(s.dir.segment(id, useFile), data)
}
