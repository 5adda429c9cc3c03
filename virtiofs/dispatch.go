package virtiofs

import (
	"encoding/binary"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// mountTime is how long a guest may believe that a subtree is mounted, or not.
const mountTime = time.Second

const stale = fuse.Status(syscall.ESTALE) // Linux looks the name up again

// dispatcher hands requests that go-fuse has taken apart to the subtree of their
// node, whose ids it translates. The tree's own directories are answered here. Only
// requests that the device lets through arrive (request.go).
type dispatcher struct {
	fuse.RawFileSystem
	tree *Tree
}

func newDispatcher(t *Tree) *dispatcher {
	return &dispatcher{RawFileSystem: fuse.NewDefaultRawFileSystem(), tree: t}
}

func (d *dispatcher) String() string { return "tatami" }

// enter finds the subtree of a request and makes the request's node one of it.
// Without one, the tree itself is asked: nil.
func (d *dispatcher) enter(h *fuse.InHeader) *mounted {
	m := d.tree.find(h.NodeId)
	if m != nil {
		h.NodeId &= localMask
	}
	return m
}

// change is enter for a change to a name.
func (d *dispatcher) change(h *fuse.InHeader, name string) (*mounted, fuse.Status) {
	if d.tree.covered(h.NodeId, name) {
		return nil, fuse.Status(syscall.EBUSY)
	}
	m := d.enter(h)
	if m == nil {
		return nil, fuse.EROFS
	}
	return m, fuse.OK
}

// entry finishes an answer that names a node.
func (m *mounted) entry(out *fuse.EntryOut, st fuse.Status) fuse.Status {
	if st.Ok() && out.NodeId != 0 {
		out.NodeId = m.node(out.NodeId)
		m.number(&out.Attr)
	}
	return st
}

// number makes inode numbers of images differ from those of a subtree around them.
func (m *mounted) number(a *fuse.Attr) {
	if m.images != nil {
		a.Ino = m.node(a.Ino)
	}
}

func (d *dispatcher) Lookup(c <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if node, m, ok := d.tree.child(in.NodeId, name); ok {
		return d.lookupPlace(c, in, node, m, out)
	}
	m := d.enter(in)
	if m == nil {
		return fuse.ENOENT // also in what is not there any more
	}
	return m.entry(out, m.fs.Lookup(c, in, name, out))
}

// lookupPlace answers for the root of a subtree, or for one of the tree's own
// directories.
func (d *dispatcher) lookupPlace(c <-chan struct{}, in *fuse.InHeader, node uint64, m *mounted, out *fuse.EntryOut) fuse.Status {
	var attr fuse.AttrOut
	if m == nil {
		fillDir(&attr, node)
	} else {
		ask := fuse.GetAttrIn{InHeader: *in}
		ask.NodeId = fuse.FUSE_ROOT_ID
		if st := m.fs.GetAttr(c, &ask, &attr); !st.Ok() {
			return st
		}
		m.number(&attr.Attr)
	}
	out.NodeId, out.Attr = node, attr.Attr
	out.AttrValid, out.AttrValidNsec = attr.AttrValid, attr.AttrValidNsec
	out.SetEntryTimeout(mountTime)
	return fuse.OK
}

func fillDir(out *fuse.AttrOut, node uint64) {
	out.SetTimeout(mountTime)
	out.Attr = fuse.Attr{Ino: node, Mode: syscall.S_IFDIR | 0o555, Nlink: 2, Blksize: 4096}
}

func (d *dispatcher) GetAttr(c <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if d.tree.own(in.NodeId) != nil {
		fillDir(out, in.NodeId)
		return fuse.OK
	}
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	st := m.fs.GetAttr(c, in, out)
	m.number(&out.Attr)
	return st
}

func (d *dispatcher) OpenDir(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if d.tree.own(in.NodeId) != nil {
		return fuse.OK
	}
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.OpenDir(c, in, out)
}

func (d *dispatcher) ReadDir(c <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if p := d.tree.own(in.NodeId); p != nil {
		for _, e := range d.tree.list(p, in.Offset) {
			if !out.AddDirEntry(e) {
				break
			}
		}
		return fuse.OK
	}
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.ReadDir(c, in, out)
}

// ReadDirPlus lists the tree's own directories without what belongs to the names,
// which is allowed.
func (d *dispatcher) ReadDirPlus(c <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if p := d.tree.own(in.NodeId); p != nil {
		for _, e := range d.tree.list(p, in.Offset) {
			if out.AddDirLookupEntry(e) == nil {
				break
			}
		}
		return fuse.OK
	}
	node := in.NodeId
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	st := m.fs.ReadDirPlus(c, in, out)
	if st.Ok() {
		d.translate(m, node, out.Bytes())
	}
	return st
}

// Sizes in a listing with entries (fuse_direntplus in linux/fuse.h).
const (
	entrySize  = 128 // fuse_entry_out, which begins with the node id
	direntSize = 24  // fuse_dirent without the name
	direntName = 16  // where in it the name's length is
)

// translate makes the nodes of a listing those of the device. A name that something
// is mounted at is not told twice.
func (d *dispatcher) translate(m *mounted, dir uint64, b []byte) {
	le := binary.LittleEndian
	for len(b) >= entrySize+direntSize {
		n := int(le.Uint32(b[entrySize+direntName:]))
		name := string(b[entrySize+direntSize:][:n])
		if node := le.Uint64(b); node != 0 && d.tree.covered(dir, name) {
			m.fs.Forget(node, 1)
			clear(b[:entrySize])
		} else if node != 0 {
			le.PutUint64(b, m.node(node))
		}
		b = b[min(len(b), (entrySize+direntSize+n+7)&^7):]
	}
}

func (d *dispatcher) StatFs(c <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	m := d.enter(in)
	if m == nil {
		out.Bsize, out.Frsize, out.NameLen = 4096, 4096, maxName
		return fuse.OK
	}
	return m.fs.StatFs(c, in, out)
}

func (d *dispatcher) Forget(node, n uint64) {
	if m := d.tree.find(node); m != nil {
		m.fs.Forget(node&localMask, n)
	}
}

func (d *dispatcher) SetAttr(c <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return fuse.EROFS
	}
	return m.fs.SetAttr(c, in, out)
}

func (d *dispatcher) Mknod(c <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	m, st := d.change(&in.InHeader, name)
	if !st.Ok() {
		return st
	}
	return m.entry(out, m.fs.Mknod(c, in, name, out))
}

func (d *dispatcher) Mkdir(c <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	m, st := d.change(&in.InHeader, name)
	if !st.Ok() {
		return st
	}
	return m.entry(out, m.fs.Mkdir(c, in, name, out))
}

func (d *dispatcher) Symlink(c <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	m, st := d.change(in, name)
	if !st.Ok() {
		return st
	}
	return m.entry(out, m.fs.Symlink(c, in, target, name, out))
}

func (d *dispatcher) Create(c <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	m, st := d.change(&in.InHeader, name)
	if !st.Ok() {
		return st
	}
	return m.entry(&out.EntryOut, m.fs.Create(c, in, name, out))
}

func (d *dispatcher) Unlink(c <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	m, st := d.change(in, name)
	if !st.Ok() {
		return st
	}
	return m.fs.Unlink(c, in, name)
}

func (d *dispatcher) Rmdir(c <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	m, st := d.change(in, name)
	if !st.Ok() {
		return st
	}
	return m.fs.Rmdir(c, in, name)
}

// peer makes another node of a request one of the same subtree.
func (d *dispatcher) peer(m *mounted, node *uint64) fuse.Status {
	if *node>>indexShift != m.index {
		return fuse.EXDEV
	}
	*node &= localMask
	return fuse.OK
}

func (d *dispatcher) Rename(c <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	if d.tree.covered(in.Newdir, to) {
		return fuse.Status(syscall.EBUSY)
	}
	m, st := d.change(&in.InHeader, from)
	if !st.Ok() {
		return st
	}
	if st := d.peer(m, &in.Newdir); !st.Ok() {
		return st
	}
	return m.fs.Rename(c, in, from, to)
}

func (d *dispatcher) Link(c <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	m, st := d.change(&in.InHeader, name)
	if !st.Ok() {
		return st
	}
	if st := d.peer(m, &in.Oldnodeid); !st.Ok() {
		return st
	}
	return m.entry(out, m.fs.Link(c, in, name, out))
}

func (d *dispatcher) Readlink(c <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	m := d.enter(in)
	if m == nil {
		return nil, stale
	}
	return m.fs.Readlink(c, in)
}

func (d *dispatcher) Access(c <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.Access(c, in)
}

func (d *dispatcher) GetXAttr(c <-chan struct{}, in *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	m := d.enter(in)
	if m == nil {
		return 0, stale
	}
	return m.fs.GetXAttr(c, in, name, dest)
}

func (d *dispatcher) ListXAttr(c <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	m := d.enter(in)
	if m == nil {
		return 0, stale
	}
	return m.fs.ListXAttr(c, in, dest)
}

func (d *dispatcher) SetXAttr(c <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.SetXAttr(c, in, name, data)
}

func (d *dispatcher) RemoveXAttr(c <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	m := d.enter(in)
	if m == nil {
		return stale
	}
	return m.fs.RemoveXAttr(c, in, name)
}

func (d *dispatcher) Open(c <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.Open(c, in, out)
}

func (d *dispatcher) Lseek(c <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.Lseek(c, in, out)
}

func (d *dispatcher) CopyFileRange(c <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	m := d.enter(&in.InHeader)
	if m == nil {
		return 0, stale
	}
	if st := d.peer(m, &in.NodeIdOut); !st.Ok() {
		return 0, st
	}
	return m.fs.CopyFileRange(c, in)
}

func (d *dispatcher) Flush(c <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.Flush(c, in)
}

func (d *dispatcher) Fsync(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.Fsync(c, in)
}

func (d *dispatcher) FsyncDir(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.FsyncDir(c, in)
}

func (d *dispatcher) Fallocate(c <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	m := d.enter(&in.InHeader)
	if m == nil {
		return stale
	}
	return m.fs.Fallocate(c, in)
}

func (d *dispatcher) Release(c <-chan struct{}, in *fuse.ReleaseIn) {
	if m := d.enter(&in.InHeader); m != nil {
		m.fs.Release(c, in)
	}
}

func (d *dispatcher) ReleaseDir(in *fuse.ReleaseIn) {
	if m := d.enter(&in.InHeader); m != nil {
		m.fs.ReleaseDir(in)
	}
}
