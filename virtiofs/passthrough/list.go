package passthrough

import (
	"math"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Bytes that are asked for at a time: as many as the guest's buffer has for names,
// fewer when all that belongs to the names goes into it.
const (
	minList   = 1 << 10 // more than the longest entry
	plusShare = 5
)

func (f *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return status(f.list(in, int(in.Size), func(_ *node, e fuse.DirEntry) bool { return out.AddDirEntry(e) }))
}

func (f *FS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return status(f.list(in, int(in.Size)/plusShare, func(dir *node, e fuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		// An entry without a node tells the name alone: the guest looks it up.
		if e.Name != "." && e.Name != ".." && f.lookup(dir, e.Name, entry) != nil {
			*entry = fuse.EntryOut{}
		}
		return true
	}))
}

// list calls add for what follows in.Offset in a directory, until that is false or
// about size bytes of names were read.
func (f *FS) list(in *fuse.ReadIn, size int, add func(dir *node, e fuse.DirEntry) bool) error {
	dir, err := f.nodes.get(in.NodeId)
	if err != nil {
		return err
	}
	defer dir.put()
	h, err := f.handles.find(in.NodeId, in.Fh)
	if err != nil {
		return err
	}
	if h.kind != unix.S_IFDIR || in.Offset > math.MaxInt64 {
		return unix.EINVAL
	}
	buf := make([]byte, max(size, minList))
	var n int
	err = h.with(func(fd int) error {
		h.list.Lock()
		defer h.list.Unlock()
		if _, err := unix.Seek(fd, int64(in.Offset), unix.SEEK_SET); err != nil {
			return err
		}
		n, err = interrupted(func() (int, error) { return unix.Getdents(fd, buf) })
		return err
	})
	if err != nil {
		return err
	}
	for buf = buf[:n]; len(buf) > 0; {
		var e fuse.DirEntry
		buf = buf[e.Parse(buf):]
		if dir.id == fuse.FUSE_ROOT_ID && e.Name == ".." {
			e.Ino = dir.key.ino // what is above is not the guest's to know
		}
		if !add(dir, e) {
			break
		}
	}
	return nil
}
