package vsock

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/containerd/errdefs"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Listen listens on addr. A unix socket that a dead process left behind is
// replaced; one that is served is ErrAlreadyExists. Closing the listener removes
// its socket. Only the owner of the process may connect to a unix socket.
func Listen(addr string) (net.Listener, error) {
	a, err := ParseAddress(addr)
	if err != nil {
		return nil, err
	}
	l, err := a.listen()
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

func (a Address) listen() (net.Listener, error) {
	switch a.Network {
	case VSock:
		return a.listenVSock()
	case Hybrid:
		path := HybridListenPath(a.Path, a.Port)
		if err := checkPath(path); err != nil {
			return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
		}
		return listenUnix(path)
	}
	return listenUnix(a.Path)
}

func (a Address) listenVSock() (net.Listener, error) {
	cid := uint32(anyCID)
	if a.HasCID {
		cid = a.CID
	}
	l, err := vsock.ListenContextID(cid, a.Port, nil)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, fmt.Errorf("%w: the kernel has no AF_VSOCK (load the vsock module): %w", errdefs.ErrUnavailable, err)
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrAlreadyExists, err)
	}
	if err != nil {
		return nil, err
	}
	return l, nil
}

func listenUnix(path string) (net.Listener, error) {
	l, err := ListenUnix("unix", path)
	if err != nil {
		return nil, err // not l, which would be a Listener that is there
	}
	return l, nil
}

// ListenUnix is Listen for a path and one of Go's networks for it: "unix", as for
// addresses, or "unixpacket".
func ListenUnix(network, path string) (*net.UnixListener, error) {
	addr := &net.UnixAddr{Net: network, Name: path}
	l, err := net.ListenUnix(network, addr)
	if errors.Is(err, unix.EADDRINUSE) {
		if err := removeStale(network, path); err != nil {
			return nil, err
		}
		l, err = net.ListenUnix(network, addr)
	}
	if err != nil {
		return nil, err
	}
	// Connecting takes write permission; a common umask grants it to nobody else
	// already, this is for the others.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// removeStale removes a socket that nobody serves any more.
func removeStale(network, path string) error {
	// connect(2) refuses a file of any other kind with the same errno.
	if st, err := os.Lstat(path); err != nil || st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%w: there is a file that is no socket", errdefs.ErrAlreadyExists)
	}
	c, err := net.Dial(network, path) //nolint:noctx // a unix socket answers at once
	if err == nil {
		_ = c.Close() // only the answer counted
		return fmt.Errorf("%w: another process serves the socket; stop it or choose another path", errdefs.ErrAlreadyExists)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%w: %w", errdefs.ErrAlreadyExists, err)
	}
	return os.Remove(path)
}
