package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	mdvsock "github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// backlog of listening sockets: connections that wait while a worker starts.
const backlog = 128

// sockets are the listening sockets of the supervisor.
type sockets struct {
	files     []*os.File     // for the worker
	listeners []net.Listener // remove their unix sockets when they are closed
}

func (s *sockets) close() {
	for _, f := range s.files {
		_ = f.Close() // nothing was written
	}
	for _, l := range s.listeners {
		_ = l.Close() // it may be closed already
	}
}

// listen returns a listener for use in this process.
func (s *sockets) listen(addr string) (net.Listener, error) {
	if a, err := vsock.ParseAddress(addr); err == nil && a.Network == vsock.Unix {
		if err := os.MkdirAll(filepath.Dir(a.Path), 0o755); err != nil { //nolint:gosec // the directory of others' sockets, too
			return nil, err
		}
	}
	l, err := vsock.Listen(addr)
	if err != nil {
		return nil, err
	}
	s.listeners = append(s.listeners, l)
	return l, nil
}

// listenFor listens for the worker: connections wait in the kernel while there
// is none.
func (s *sockets) listenFor(addr string) error {
	a, err := vsock.ParseAddress(addr)
	if err != nil {
		return err
	}
	if a.Network == vsock.VSock {
		f, err := listenVSock(a)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", addr, err)
		}
		s.files = append(s.files, f)
		return nil
	}
	l, err := s.listen(addr)
	if err != nil {
		return err
	}
	ul, ok := l.(interface{ File() (*os.File, error) })
	if !ok {
		return fmt.Errorf("listen on %s: %w", addr, errors.ErrUnsupported)
	}
	f, err := ul.File()
	if err != nil {
		return fmt.Errorf("listen on %s: %w", addr, err)
	}
	s.files = append(s.files, f)
	return nil
}

// listenVSock makes the socket itself: a listener of mdlayher/vsock does not
// give its descriptor away.
func listenVSock(a vsock.Address) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket (is the vsock module loaded?): %w", err)
	}
	cid := uint32(unix.VMADDR_CID_ANY)
	if a.HasCID {
		cid = a.CID
	}
	err = unix.Bind(fd, &unix.SockaddrVM{CID: cid, Port: a.Port})
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), a.String()), nil
}

// inherited makes a listener of a socket that the supervisor passed on.
func inherited(f *os.File) (net.Listener, error) {
	defer f.Close()
	domain, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return nil, fmt.Errorf("inherited socket %s: %w", f.Name(), err)
	}
	if domain == unix.AF_VSOCK {
		l, err := mdvsock.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("inherited socket %s: %w", f.Name(), err)
		}
		return l, nil
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("inherited socket %s: %w", f.Name(), err)
	}
	return l, nil
}
