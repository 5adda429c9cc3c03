package kata

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// Listen accepts what the guest behind the VMM's hybrid socket sends to port of
// the node: the VMM connects to "<path>_<port>". That socket belongs to the
// owner of the VMM's own, so that a VMM under another user, or in a jail
// (where the same directory is its root), can connect; nobody else can. A
// socket that a dead process left is replaced, one that is served is
// ErrAlreadyExists. Closing removes it.
//
// The directory is opened without following symbolic links and everything is
// done relative to it: a VMM that has it can replace what is in it, and its
// path may have no room for the port in a socket's address.
func Listen(path string, port uint32) (net.Listener, error) {
	h := &hybrid{name: vsock.HybridListenPath(filepath.Base(path), port), addr: vsock.HybridListenPath(path, port)}
	if err := h.open(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", h.addr, err)
	}
	return h, nil
}

// hybrid is a listening socket in a directory that another user may change.
type hybrid struct {
	*net.UnixListener
	dir   int    // file descriptor
	name  string // in dir
	addr  string // the whole path
	stamp stamp
	once  sync.Once
	err   error // of Close
}

func (h *hybrid) open(path string) error {
	dir, err := unix.Openat2(unix.AT_FDCWD, filepath.Dir(path), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return fmt.Errorf("open the directory of the VMM's socket: %w", err)
	}
	h.dir = dir
	if err := h.listen(); err != nil {
		return errors.Join(err, unix.Close(dir))
	}
	if err := h.give(filepath.Base(path)); err != nil {
		return errors.Join(fmt.Errorf("give the socket to the VMM's user: %w", err), h.Close())
	}
	return nil
}

func (h *hybrid) listen() error {
	l, err := h.bind()
	if errors.Is(err, unix.EADDRINUSE) {
		if err := h.removeStale(); err != nil {
			return err
		}
		l, err = h.bind()
	}
	if err != nil {
		return err
	}
	h.UnixListener = l.(*net.UnixListener)
	h.SetUnlinkOnClose(false) // its path is good only as long as dir is open
	h.stamp, _ = stampOf(h.dir, h.name, unix.S_IFSOCK)
	return nil
}

// reach is a short path to the socket.
func (h *hybrid) reach() string {
	return "/proc/self/fd/" + strconv.Itoa(h.dir) + "/" + h.name
}

// bind makes the socket. Connecting takes write permission, which bind(2)
// takes over from the socket: there is no moment at which others have it.
func (h *hybrid) bind() (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(cerr, err)
	}}
	return lc.Listen(context.Background(), "unix", h.reach()) // opens at once
}

func (h *hybrid) removeStale() error {
	if _, ok := stampOf(h.dir, h.name, unix.S_IFSOCK); !ok {
		return fmt.Errorf("there is a file that is no socket: %w", errdefs.ErrAlreadyExists)
	}
	if !gone(context.Background(), h.reach()) {
		return fmt.Errorf("another process serves the socket: %w", errdefs.ErrAlreadyExists)
	}
	return unix.Unlinkat(h.dir, h.name, 0)
}

// give makes the owner of the VMM's socket, or else of the directory, the
// owner of ours. Ours is opened first: what is given away is a socket, whatever
// its name means by now.
func (h *hybrid) give(vmm string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(h.dir, vmm, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		if err := unix.Fstat(h.dir, &st); err != nil {
			return err
		}
	}
	if int(st.Uid) == os.Geteuid() {
		return nil
	}
	fd, err := unix.Openat(h.dir, h.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if now, ok := stampOf(fd, "", unix.S_IFSOCK); !ok || now != h.stamp {
		return fmt.Errorf("it was replaced meanwhile: %w", errdefs.ErrFailedPrecondition)
	}
	return unix.Fchownat(fd, "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH)
}

// Addr implements net.Listener.
func (h *hybrid) Addr() net.Addr { return &net.UnixAddr{Name: h.addr, Net: "unix"} }

// Close implements net.Listener. It is idempotent.
func (h *hybrid) Close() error {
	h.once.Do(func() {
		h.err = h.UnixListener.Close()
		if now, ok := stampOf(h.dir, h.name, unix.S_IFSOCK); ok && now == h.stamp {
			h.err = errors.Join(h.err, unix.Unlinkat(h.dir, h.name, 0))
		}
		h.err = errors.Join(h.err, unix.Close(h.dir))
	})
	return h.err
}
