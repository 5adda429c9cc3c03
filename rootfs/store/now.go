package store

import (
	"os"

	"golang.org/x/sys/unix"
)

// ReadNow fills p with the bytes from off on, which lie within Size, if that needs no
// waiting, not even for a disk: chunks that wait in memory, and present ones that the
// page cache has. Otherwise it returns false, and p is undefined; ReadAt reads the same.
func (i *Image) ReadNow(p []byte, off int64) bool {
	end := off + int64(len(p))
	if boot := i.image.record.BootSize; off < boot {
		return end <= boot && i.h.s.preadNow(i.image.boot, p, off)
	}
	v := i.h.viewAt(off)
	if end > v.desc.End() || !v.readNow(p, off-v.desc.Off) {
		return false
	}
	v.h.counts.Load().hit(int64(len(p)))
	return true
}

// readNow leaves to readAt what leads to readahead.
func (v *view) readNow(p []byte, off int64) bool {
	g, end := v.seg, off+int64(len(p))
	if g.ahead.marked(off, end) || !g.takeNow(p, off) && !g.presentNow(p, off) {
		return false
	}
	v.note(off, end)
	return true
}

// takeNow reads from the chunks that wait in memory, if all are there.
func (g *segment) takeNow(p []byte, off int64) bool {
	if g.home.Load() != nil {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	end := off + int64(len(p))
	from, to := g.span(off, end)
	if !g.s.mem.takeRun(g, from, to, p, off) {
		return false
	}
	g.ahead.habit.saw(off, end-off)
	return true
}

// takeRun is take for what of the chunks [from, to) of g lies in p, which begins at off
// of the segment: all of it or nothing. Precondition: g.mu is held and g has no home.
func (m *memory) takeRun(g *segment, from, to int, p []byte, off int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := from; i < to; i++ {
		if m.blocks[blockKey{g, i}] == nil {
			return false
		}
	}
	clear(p) // what no chunk covers is zeros
	for i := from; i < to; i++ {
		c := g.table.Chunks[i]
		lo, hi := max(off, c.Off), min(off+int64(len(p)), c.End())
		if m.give(m.blocks[blockKey{g, i}], p[lo-off:hi-off], lo-c.Off) {
			g.bits.set(i)
		}
	}
	return true
}

// presentNow reads from home what the page cache has of it.
func (g *segment) presentNow(p []byte, off int64) bool {
	epoch := g.epoch.Load() // before the bits
	if !g.present(off, off+int64(len(p))) || g.links.Load() != nil {
		return false
	}
	h := g.home.Load()
	return g.s.preadNow(h.file, p, h.off+off) && g.epoch.Load() == epoch
}

// preadNow reads a file of the store if no disk has to be waited for. tmpfs has none,
// and does not know RWF_NOWAIT (Linux 6.18, mm/shmem.c sets no FMODE_NOWAIT).
func (s *Store) preadNow(f *os.File, p []byte, off int64) bool {
	if s.inMemory {
		n, _ := f.ReadAt(p, off)
		return n == len(p)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	err = conn.Control(func(fd uintptr) { // a file that is being closed stays until then
		n, _ = unix.Preadv2(int(fd), [][]byte{p}, off, unix.RWF_NOWAIT)
	})
	return err == nil && n == len(p)
}

// isInMemory says whether the files of a directory are in memory.
func isInMemory(dir string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	return st.Type == unix.TMPFS_MAGIC, err
}
