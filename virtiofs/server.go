package virtiofs

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
)

// Server is a device for one VMM.
type Server struct {
	dev   *device
	front *vhostuser.Server
}

// New makes a device.
func New(cfg Config) (*Server, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	d, err := newDevice(cfg)
	if err == nil {
		err = d.resume(cfg.Session)
	}
	if err != nil {
		return nil, err
	}
	front, err := vhostuser.New(vhostuser.Config{Device: d, Queues: 1 + cfg.Queues, Space: cfg.space(),
		Broken: cfg.Broken, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	return &Server{dev: d, front: front}, nil
}

// Accept waits for the VMM and closes l, which removes a path that it was made
// with: one device has one VMM in its life. The error is ctx's when ctx ends first.
func Accept(ctx context.Context, l *net.UnixListener) (*net.UnixConn, error) {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // AcceptUnix reports it
	defer stop()
	c, err := l.AcceptUnix()
	_ = l.Close() // it may be closed already
	switch {
	case err == nil && ctx.Err() == nil:
		return c, nil
	case err == nil:
		err = c.Close()
	}
	return nil, fmt.Errorf("wait for the VMM: %w", errors.Join(ctx.Err(), err))
}

// Serve serves the VMM and closes c. It returns nil as soon as the VMM has left, for
// whatever reason, or ctx has ended; an error is a VMM that broke the protocol. A
// guest cannot end it.
func (s *Server) Serve(ctx context.Context, c *net.UnixConn) error { return s.front.ServeConn(ctx, c) }

// Stats returns the counters.
func (s *Server) Stats() Stats { return s.dev.stats() }
