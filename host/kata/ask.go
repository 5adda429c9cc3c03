package kata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// monitor is the name of a shim's socket in its directory.
const monitor = "shim-monitor.sock"

// Bounds of a shim's answer.
const (
	askTimeout   = time.Second
	probeTimeout = 100 * time.Millisecond
	headerBytes  = 16 << 10
)

// ask gets the agent's url from the shim behind socket, which ErrPermissionDenied
// says it is not. A shim that does not answer (yet) is ErrUnavailable; the Go shim's 500 counts as that, too
// (containerd-shim-v2/shim_management.go, agentURL).
func ask(ctx context.Context, socket string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dialShim(ctx, socket) },
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: headerBytes,
	}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://shim/agent-url", nil)
	if err != nil {
		return "", err
	}
	resp, err := transport.RoundTrip(req) // follows no redirect
	if errdefs.IsPermissionDenied(err) {
		return "", fmt.Errorf("ask the shim: %w", err)
	}
	if err != nil {
		return "", fmt.Errorf("ask the shim: %w: %w", errdefs.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("ask the shim: it answers HTTP status %d: %w", resp.StatusCode, errdefs.ErrUnavailable)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxURL+1))
	if err != nil {
		return "", fmt.Errorf("ask the shim: %w: %w", errdefs.ErrUnavailable, err)
	}
	return string(body), nil
}

// dialShim connects to a socket that this user's, or root's, process listens on.
// A VMM under another user may have the directory, but it is no shim: it could
// say that it is another machine.
func dialShim(ctx context.Context, socket string) (net.Conn, error) {
	c, err := dial(ctx, socket)
	if err != nil {
		return nil, err
	}
	uid, err := listenerUID(c)
	if err == nil && uid != 0 && uid != uint32(os.Geteuid()) {
		err = fmt.Errorf("user %d listens on its socket: %w", uid, errdefs.ErrPermissionDenied)
	}
	if err != nil {
		_ = c.Close() // nothing was said
		return nil, err
	}
	return c, nil
}

// listenerUID is who called listen(2) (SO_PEERCRED, unix(7)).
func listenerUID(c net.Conn) (uid uint32, err error) {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	})
	return uid, errors.Join(cerr, err)
}

func dial(ctx context.Context, socket string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", socket)
}

// gone says whether nobody listens on socket any more. A shim that is only slow
// is not gone.
func gone(ctx context.Context, socket string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	c, err := dial(ctx, socket)
	if err == nil {
		_ = c.Close() // only the answer counted
	}
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT)
}

// stamp tells one socket from another that has the same path later.
type stamp struct {
	dev, ino uint64
	born     unix.StatxTimestamp // zero where the file system does not say
}

// stampOf returns the stamp of a file of the kind (unix.S_IFSOCK, S_IFREG);
// ok is false when there is none such.
func stampOf(dirfd int, path string, kind uint16) (s stamp, ok bool) {
	var st unix.Statx_t
	err := unix.Statx(dirfd, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH, unix.STATX_TYPE|unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil || st.Mode&unix.S_IFMT != kind {
		return stamp{}, false
	}
	s = stamp{dev: uint64(st.Dev_major)<<32 | uint64(st.Dev_minor), ino: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		s.born = st.Btime
	}
	return s, true
}
