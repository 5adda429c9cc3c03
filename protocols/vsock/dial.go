package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/mdlayher/vsock"
)

var errRefused = errors.New("nothing listens on the port, or the virtual machine is not running")

// Dial connects to addr. A peer that is not there (yet) is ErrUnavailable, an
// address that cannot be dialled ErrInvalidArgument; when ctx ends first the error
// is the context's.
func Dial(ctx context.Context, addr string) (net.Conn, error) {
	a, err := ParseAddress(addr)
	if err != nil {
		return nil, err
	}
	if a.Network == VSock && !a.HasCID {
		return nil, fmt.Errorf("dial %s: %w: no context ID (vsock:CID:PORT)", addr, errdefs.ErrInvalidArgument)
	}
	c, err := a.dial(ctx)
	switch {
	case err == nil:
		return c, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("dial %s: %w", addr, context.Cause(ctx))
	}
	return nil, fmt.Errorf("dial %s: %w: %w", addr, errdefs.ErrUnavailable, err)
}

func (a Address) dial(ctx context.Context) (net.Conn, error) {
	switch a.Network {
	case VSock:
		// Not returned directly: a nil *vsock.Conn is no nil net.Conn.
		c, err := vsock.DialContext(ctx, a.CID, a.Port, nil)
		if err != nil {
			return nil, err
		}
		return c, nil
	case Hybrid:
		return a.dialHybrid(ctx)
	}
	return dialUnix(ctx, a.Path)
}

func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", path)
}

func (a Address) dialHybrid(ctx context.Context) (net.Conn, error) {
	c, err := dialUnix(ctx, a.Path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	err = connect(c, a.Port)
	if !stop() && err == nil {
		err = ctx.Err() // the deadline may have hit the connection already
	}
	if err != nil {
		_ = c.Close() // the handshake's error is the one to report
		return nil, err
	}
	return c, nil
}

// PeerCID is the context ID of an AF_VSOCK connection's peer; on the node it
// identifies the virtual machine and cannot be forged by it. ok is false on the
// other transports, where the socket's path identifies the peer.
func PeerCID(c net.Conn) (cid uint32, ok bool) {
	a, ok := c.RemoteAddr().(*vsock.Addr)
	if !ok {
		return 0, false
	}
	return a.ContextID, true
}
