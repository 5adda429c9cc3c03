package passthrough

import (
	"errors"
	"math"
	"os"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// handle is a file or directory that the guest has open. Immutable.
type handle struct {
	node uint64
	kind uint32 // S_IFREG or S_IFDIR
	f    *os.File
	list sync.Mutex // whoever reads the directory, which moves its offset
}

// handles are those of a session, by number.
type handles struct {
	budget *Budget

	mu     sync.RWMutex
	last   uint64 // number given last; never used again
	open   map[uint64]*handle
	closed bool
}

func newHandles(b *Budget) *handles { return &handles{budget: b, open: map[uint64]*handle{}} }

// add takes over a descriptor, for which the budget was asked.
func (t *handles) add(node uint64, kind uint32, fd int) (uint64, error) {
	h := &handle{node: node, kind: kind, f: os.NewFile(uintptr(fd), "shared file")}
	t.mu.Lock()
	if !t.closed {
		t.last++
		t.open[t.last] = h
	}
	closed, id := t.closed, t.last
	t.mu.Unlock()
	if closed {
		t.drop(h)
		return 0, unix.ESTALE
	}
	return id, nil
}

// drop closes a handle. Who uses it holds its descriptor; a guest that wants to know
// of errors of writes has asked by FLUSH.
func (t *handles) drop(h *handle) {
	_ = h.f.Close()
	t.budget.give(1)
}

// find returns the handle of that number, which must be one of the node.
func (t *handles) find(node, id uint64) (*handle, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if h := t.open[id]; h != nil && h.node == node {
		return h, nil
	}
	return nil, unix.EBADF
}

// with does something with a handle's descriptor, which stays open meanwhile.
func (t *handles) with(node, id uint64, do func(fd int) error) error {
	h, err := t.find(node, id)
	if err != nil {
		return err
	}
	return h.with(do)
}

// file is with for a file, not a directory.
func (t *handles) file(node, id uint64, do func(fd int) error) error {
	h, err := t.find(node, id)
	if err != nil {
		return err
	}
	if h.kind != unix.S_IFREG {
		return unix.EBADF
	}
	return h.with(do)
}

func (h *handle) with(do func(fd int) error) error {
	conn, err := h.f.SyscallConn()
	if err != nil {
		return unix.EBADF
	}
	if cerr := conn.Control(func(fd uintptr) { err = do(int(fd)) }); cerr != nil {
		return unix.EBADF // released meanwhile
	}
	return err
}

func (t *handles) release(node, id uint64) {
	t.mu.Lock()
	h := t.open[id]
	if h == nil || h.node != node {
		t.mu.Unlock()
		return
	}
	delete(t.open, id)
	t.mu.Unlock()
	t.drop(h)
}

func (t *handles) clear() {
	t.mu.Lock()
	old := t.open
	t.open = map[uint64]*handle{}
	t.mu.Unlock()
	for _, h := range old {
		t.drop(h)
	}
}

func (t *handles) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.clear()
}

// openFlags are those that mean something on the node. Appending is said with each
// write; O_DIRECT is left out, as the node's cache is what guests share.
func (f *FS) openFlags(guest uint32) (int, error) {
	flags := int(guest) & (unix.O_ACCMODE | unix.O_TRUNC | unix.O_SYNC | unix.O_DSYNC)
	if f.o.ReadOnly && (flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0) {
		return 0, unix.EROFS
	}
	return flags, nil
}

func (f *FS) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	flags, err := f.openFlags(in.Flags)
	if err != nil {
		return status(err)
	}
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return status(err)
	}
	defer n.put()
	return status(f.open(n, unix.S_IFREG, flags, in.Mode&fuse.OPEN_KILL_SUIDGID != 0, out))
}

func (f *FS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return status(err)
	}
	defer n.put()
	return status(f.open(n, unix.S_IFDIR, unix.O_RDONLY|unix.O_DIRECTORY, false, out))
}

// open makes a handle of a node of that kind.
func (f *FS) open(n *node, kind uint32, flags int, kill bool, out *fuse.OpenOut) error {
	switch {
	case n.kind == kind:
	case kind == unix.S_IFDIR:
		return unix.ENOTDIR
	case n.kind == unix.S_IFDIR:
		return unix.EISDIR
	default:
		return unix.EINVAL // a device or a pipe, which is the guest's own
	}
	if err := f.take(); err != nil {
		return err
	}
	var fd int
	err := unprivileged(kill, func() (err error) {
		fd, err = f.reopen(n.fd, flags)
		return err
	})
	if err != nil {
		f.o.Budget.give(1)
		return err
	}
	out.OpenFlags = f.cacheFlags(kind)
	out.Fh, err = f.handles.add(n.id, kind, fd)
	return err
}

// cacheFlags tell the guest what it may keep of an open file (virtiofsd's do_open).
func (f *FS) cacheFlags(kind uint32) uint32 {
	dir := kind == unix.S_IFDIR
	switch {
	case f.o.Cache == CacheAlways && dir, f.o.Cache == CacheMetadata && dir:
		return fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	case f.o.Cache == CacheAlways:
		return fuse.FOPEN_KEEP_CACHE
	case f.o.Cache == CacheMetadata, f.o.Cache == CacheNever && !dir:
		return fuse.FOPEN_DIRECT_IO
	}
	return 0
}

// ReadV implements virtiofs.Files.
func (f *FS) ReadV(in *fuse.ReadIn, bufs [][]byte, wait bool) (n int, _ syscall.Errno) {
	flags := 0
	if !wait {
		flags = unix.RWF_NOWAIT
	}
	err := f.handles.file(in.NodeId, in.Fh, func(fd int) (err error) {
		n, err = interrupted(func() (int, error) { return unix.Preadv2(fd, bufs, int64(in.Offset), flags) })
		return err
	})
	return max(n, 0), errno(err)
}

// WriteV implements virtiofs.Files. The guest knows where an appending write will
// land only if nobody else writes, so the node finds the end.
func (f *FS) WriteV(in *fuse.WriteIn, bufs [][]byte) (n int, _ syscall.Errno) {
	flags := 0
	if in.Flags&unix.O_APPEND != 0 && in.WriteFlags&fuse.WRITE_CACHE == 0 {
		flags = unix.RWF_APPEND
	}
	err := f.handles.file(in.NodeId, in.Fh, func(fd int) error {
		return unprivileged(in.WriteFlags&fuse.WRITE_KILL_SUIDGID != 0, func() (err error) {
			n, err = interrupted(func() (int, error) { return unix.Pwritev2(fd, bufs, int64(in.Offset), flags) })
			return err
		})
	})
	return max(n, 0), errno(err)
}

// interrupted makes a system call again that a signal cut short.
func interrupted(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func (f *FS) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { f.handles.release(in.NodeId, in.Fh) }

func (f *FS) ReleaseDir(in *fuse.ReleaseIn) { f.handles.release(in.NodeId, in.Fh) }

// Flush tells of errors of writes, as close does: it closes a copy of the descriptor.
func (f *FS) Flush(_ <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	return status(f.handles.file(in.NodeId, in.Fh, func(fd int) error {
		again, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return unix.Close(again)
	}))
}

func (f *FS) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return status(f.handles.with(in.NodeId, in.Fh, func(fd int) error {
		if in.FsyncFlags&1 != 0 { // FUSE_FSYNC_FDATASYNC
			return unix.Fdatasync(fd)
		}
		return unix.Fsync(fd)
	}))
}

func (f *FS) FsyncDir(c <-chan struct{}, in *fuse.FsyncIn) fuse.Status { return f.Fsync(c, in) }

// SyncFS implements virtiofs.Files.
func (f *FS) SyncFS(id uint64) syscall.Errno {
	n, err := f.nodes.get(id)
	if err != nil {
		return errno(err)
	}
	defer n.put()
	if !n.openable() {
		return syscall.EINVAL
	}
	fd, err := f.reopen(n.fd, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return errno(err)
	}
	defer unix.Close(fd)
	return errno(unix.Syncfs(fd))
}

func (f *FS) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	return status(f.handles.file(in.NodeId, in.Fh, func(fd int) error {
		_, err := interrupted(func() (int, error) {
			return 0, unix.Fallocate(fd, in.Mode, int64(in.Offset), int64(in.Length))
		})
		return err
	}))
}

func (f *FS) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	return status(f.handles.file(in.NodeId, in.Fh, func(fd int) error {
		at, err := unix.Seek(fd, int64(in.Offset), int(in.Whence))
		out.Offset = uint64(at)
		return err
	}))
}

// maxCopy bounds one COPY_FILE_RANGE: the answer has 32 bits, and its slot is held
// meanwhile. The guest goes on with the rest.
const maxCopy = 1 << 30

func (f *FS) CopyFileRange(_ <-chan struct{}, in *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	if in.OffIn > math.MaxInt64 || in.OffOut > math.MaxInt64 {
		return 0, fuse.EINVAL
	}
	from, to := int64(in.OffIn), int64(in.OffOut)
	var n int
	err := f.handles.file(in.NodeId, in.FhIn, func(fd int) error {
		return f.handles.file(in.NodeIdOut, in.FhOut, func(out int) (err error) {
			n, err = unix.CopyFileRange(fd, &from, out, &to, int(min(in.Len, maxCopy)), int(in.Flags))
			return err
		})
	})
	return uint32(max(n, 0)), status(err)
}
