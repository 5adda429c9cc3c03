package kata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
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

// ask gets the agent's url from the shim behind socket. A shim that does not
// answer (yet) is ErrUnavailable; the Go shim's 500 counts as that, too
// (containerd-shim-v2/shim_management.go, agentURL).
func ask(ctx context.Context, socket string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, socket) },
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
