package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/containerd/errdefs"
)

// maxQueues is what the 8-bit queue number beside a ring's descriptor can name.
const maxQueues = 256

// Device is a virtio device without its transport.
type Device interface {
	// Serve works on queue i until q.Wait returns false, on a goroutine of its
	// own. It is called for each start; after a pause it continues where the
	// one before ended.
	Serve(i int, q *Queue)
	// Stopped tells that the driver gave queue i up (power off, reboot, reset,
	// unbind, end of the VMM) or that the machine is paused. Serve has returned.
	Stopped(i int)
}

// Config describes a server.
type Config struct {
	Device   Device
	Queues   int    // number of virtqueues, 1 to 256
	Features uint64 // the device's own feature bits
	Space    []byte // virtio configuration space, read-only; at most 256 bytes
	// Broken is told, on a goroutine of the device's, that a guest broke a ring
	// or a kick failed; may be nil, must not wait for the server.
	// The server goes on, and the guest's next driver start mends the device.
	Broken func(error)
	Log    *slog.Logger // nil for none
}

// Server offers one device to one VMM connection after another.
type Server struct {
	cfg Config
}

// New makes a server.
func New(cfg Config) (*Server, error) {
	if cfg.Device == nil || cfg.Queues < 1 || cfg.Queues > maxQueues || len(cfg.Space) > maxConfig {
		return nil, fmt.Errorf("make vhost-user server: %w: %d queues, %d bytes of configuration",
			errdefs.ErrInvalidArgument, cfg.Queues, len(cfg.Space))
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg}, nil
}

// Serve serves connections of l, one at a time, until ctx ends; then it returns
// nil with the device stopped and l closed. A connection that ends with an error
// is logged, and the next one is awaited.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // Accept reports it
	defer stop()
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close() // it came too late
			}
			return nil
		}
		if err != nil {
			return errors.Join(fmt.Errorf("accept VMM: %w", err), l.Close())
		}
		if err := s.ServeConn(ctx, c); err != nil {
			s.cfg.Log.Warn("connection of the VMM ended", "err", err)
		}
	}
}

// ServeConn serves one connection and closes it. It returns nil when the VMM left
// or ctx ended.
func (s *Server) ServeConn(ctx context.Context, c *net.UnixConn) error {
	stop := context.AfterFunc(ctx, func() { _ = c.CloseRead() }) // ends receive
	defer stop()
	sess := newSession(s.cfg, c)
	err := sess.run()
	cerr := sess.close()
	if ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, cerr)
}

// ListenerFromFD makes a listener of an inherited listening socket and owns fd:
// Kata starts its virtio-fs daemon with --fd=3.
func ListenerFromFD(fd int) (*net.UnixListener, error) {
	f := os.NewFile(uintptr(fd), "vhost-user")
	if f == nil {
		return nil, fmt.Errorf("listen on descriptor %d: %w", fd, os.ErrInvalid)
	}
	l, err := net.FileListener(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("listen on descriptor %d: %w", fd, err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("listen on descriptor %d: not a unix socket", fd), l.Close())
	}
	return ul, nil
}
