package virtiofs

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
)

// filesystem answers what go-fuse has taken apart, for a Directory: everything but
// reads. What it lacks the device does not ask for (imageErrno).
type filesystem struct {
	fuse.RawFileSystem
	dir *Directory
}

// FileSystem implements Subtree.
func (d *Directory) FileSystem() fuse.RawFileSystem {
	return &filesystem{RawFileSystem: fuse.NewDefaultRawFileSystem(), dir: d}
}

func (f *filesystem) String() string { return "tatami" }

func (f *filesystem) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	var n *node
	if in.NodeId == fuse.FUSE_ROOT_ID {
		n = f.dir.lookup(name)
	}
	if n == nil {
		// An error, not node id 0: that would be a negative entry, and the name
		// may exist the next time.
		return fuse.ENOENT
	}
	imagefs.FillEntry(out, n.id, n.size)
	return fuse.OK
}

func (f *filesystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.NodeId == fuse.FUSE_ROOT_ID {
		imagefs.FillRoot(out)
		return fuse.OK
	}
	n := f.dir.node(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	imagefs.FillFile(out, n.id, n.size)
	return fuse.OK
}

func (f *filesystem) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Flags&syscall.O_ACCMODE != syscall.O_RDONLY || in.Flags&syscall.O_TRUNC != 0 {
		return fuse.EROFS
	}
	if f.dir.node(in.NodeId) == nil {
		return fuse.Status(syscall.ESTALE) // Linux looks the name up again
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
	if !f.dir.Cached {
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	}
	return fuse.OK
}

func (f *filesystem) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	if in.NodeId != fuse.FUSE_ROOT_ID {
		return fuse.ENOTDIR
	}
	return fuse.OK
}

// ReadDir lists the files behind the one whose id is the offset, so that a listing
// goes on at the right place when files come and go.
func (f *filesystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for _, n := range f.dir.after(in.Offset) {
		if !out.AddDirEntry(fuse.DirEntry{Name: n.name, Ino: n.id, Mode: syscall.S_IFREG, Off: n.id}) {
			break
		}
	}
	return fuse.OK
}

// ReadDirPlus is ReadDir: what belongs to the names is not told, which is allowed.
func (f *filesystem) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for _, n := range f.dir.after(in.Offset) {
		if out.AddDirLookupEntry(fuse.DirEntry{Name: n.name, Ino: n.id, Mode: syscall.S_IFREG, Off: n.id}) == nil {
			break
		}
	}
	return fuse.OK
}

func (f *filesystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	imagefs.FillStatFs(out)
	return fuse.OK
}
