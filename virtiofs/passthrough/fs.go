package passthrough

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/virtiofs"
)

// Cache is what a guest may keep; the names are those of virtiofsd's --cache.
type Cache string

const (
	// CacheNever keeps nothing: each look and each read asks the node.
	CacheNever Cache = "never"
	// CacheAuto keeps names and attributes for a second, data until the file is
	// opened again. It is the default.
	CacheAuto Cache = "auto"
	// CacheMetadata keeps names and attributes for a day, no data.
	CacheMetadata Cache = "metadata"
	// CacheAlways keeps all of it, for trees that only this guest changes.
	CacheAlways Cache = "always"
)

// Options of a FS. Zero values are the defaults.
type Options struct {
	ReadOnly bool // every change fails with EROFS
	XAttr    bool // extended attributes
	// Trusted lets the guest's root keep trusted.* attributes, which its overlayfs needs
	// of an upper directory: under names of their own, for those of the node are not
	// the guest's.
	Trusted bool
	Cache   Cache
	// AnnounceSubmounts lets the guest see a mount where there is one below the
	// directory, without which two files may seem to be the same one.
	AnnounceSubmounts bool
	// Budget of descriptors, which several FS may share; nil for DefaultBudget.
	Budget *Budget
	// Proc is this process's /proc/self/fd, which stays the caller's and open; nil
	// to open it.
	Proc *os.File
	Log  *slog.Logger // nil for none
}

// FS is a directory of the node as virtiofs.Subtree.
type FS struct {
	fuse.RawFileSystem
	o       Options
	proc    *os.File
	ownProc bool
	valid   time.Duration // of names and attributes
	nodes   *nodes
	handles *handles
	closing sync.Once
	full    sync.Once // the log says that the budget is used up
}

// New serves the directory root, which is duplicated; it may be open with O_PATH.
func New(root *os.File, o Options) (_ *FS, err error) {
	f := &FS{RawFileSystem: fuse.NewDefaultRawFileSystem(), o: o}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("pass through %s: %w", root.Name(), err), f.Close())
		}
	}()
	if o.Log == nil {
		f.o.Log = slog.New(slog.DiscardHandler)
	}
	switch o.Cache {
	case CacheNever:
	case "", CacheAuto:
		f.valid = time.Second
	case CacheMetadata, CacheAlways:
		f.valid = 24 * time.Hour
	default:
		return nil, fmt.Errorf("%w: cache %q is not one of never, auto, metadata, always", errdefs.ErrInvalidArgument, o.Cache)
	}
	if f.o.Budget == nil {
		if f.o.Budget, err = DefaultBudget(0); err != nil {
			return nil, err
		}
	}
	if f.proc = o.Proc; f.proc == nil {
		if f.proc, err = openProc(); err != nil {
			return nil, err
		}
		f.ownProc = true
	}
	unix.Umask(0)
	if f.nodes, err = newNodes(root, f.o.Budget); err != nil {
		return nil, err
	}
	f.handles = newHandles(f.o.Budget)
	return f, nil
}

func openProc() (*os.File, error) {
	const path = "/proc/self/fd"
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// FileSystem implements virtiofs.Subtree.
func (f *FS) FileSystem() fuse.RawFileSystem { return f }

func (f *FS) String() string { return "passthrough" }

// Reset implements virtiofs.Files.
func (f *FS) Reset() {
	f.handles.clear()
	f.nodes.clear()
}

// take asks the budget for a descriptor.
func (f *FS) take() error {
	err := f.o.Budget.take()
	if err != nil {
		f.full.Do(func() {
			f.o.Log.Warn("the guest uses all files that it may have open; it gets ENFILE until it forgets some. Raise RLIMIT_NOFILE to allow more",
				"allowed", f.o.Budget.max)
		})
	}
	return err
}

// Close drops everything. Requests after it fail with ESTALE.
func (f *FS) Close() (err error) {
	f.closing.Do(func() {
		if f.handles != nil {
			f.handles.close()
		}
		if f.nodes != nil {
			f.nodes.close()
		}
		if f.ownProc {
			err = f.proc.Close()
		}
	})
	return err
}

// reopen opens the file of an O_PATH descriptor, through the magic link of /proc.
// Precondition: it is one to be opened (node.openable), or flags have O_PATH.
func (f *FS) reopen(fd, flags int) (again int, err error) {
	err = f.magic(fd, func(proc int, link string) (err error) {
		again, err = retry(func() (int, error) { return unix.Openat(proc, link, flags|unix.O_CLOEXEC, 0) })
		return err
	})
	return again, err
}

// magic does something with the magic link of a descriptor: its name in the directory
// proc, which stays open meanwhile. To follow it leads to the file, and no further.
func (f *FS) magic(fd int, do func(proc int, link string) error) error {
	conn, err := f.proc.SyscallConn()
	if err != nil {
		return unix.ESTALE
	}
	if cerr := conn.Control(func(proc uintptr) { err = do(int(proc), strconv.Itoa(fd)) }); cerr != nil {
		return unix.ESTALE // closed meanwhile
	}
	return err
}

// retry makes a system call again that a signal interrupted, or, with openat2, a
// rename somewhere on the node.
func retry[T any](call func() (T, error)) (T, error) {
	for range maxRetries {
		if v, err := call(); !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return v, err
		}
	}
	return call()
}

const maxRetries = 100

// status makes a guest's error of one of a system call, never ENOSYS, which would
// turn the request off for all subtrees.
func status(err error) fuse.Status { return fuse.Status(errno(err)) }

func errno(err error) syscall.Errno {
	var e syscall.Errno
	switch {
	case err == nil:
		return 0
	case !errors.As(err, &e):
		return syscall.EIO
	case e == syscall.ENOSYS:
		return syscall.EOPNOTSUPP
	}
	return e
}

// readOnly refuses a change.
func (f *FS) readOnly() error {
	if f.o.ReadOnly {
		return unix.EROFS
	}
	return nil
}

var (
	_ virtiofs.Subtree = (*FS)(nil)
	_ virtiofs.Files   = (*FS)(nil)
)
