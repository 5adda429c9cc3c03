package vhostvsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"golang.org/x/sync/errgroup"
)

// Server is a device with its two sockets: one for the VMM, one for clients on the
// node.
type Server struct {
	cfg    Config
	vmm    *net.UnixListener
	host   *net.UnixListener
	cancel context.CancelFunc
	dev    *Device
	front  *vhostuser.Server
}

// Listen makes both sockets: vmm is the path that the VMM connects to, cfg.Path the
// one for clients. Both must not exist. After Listen a VMM may start; Serve must
// follow.
func Listen(cfg Config, vmm string) (*Server, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{cfg: cfg, cancel: cancel, dev: newDevice(ctx, cfg)}
	var err error
	s.front, err = vhostuser.New(vhostuser.Config{Device: s.dev, Queues: numQueues, Space: s.dev.space(),
		Broken: s.dev.broken, Log: cfg.Log})
	if err == nil {
		s.vmm, err = listenUnix(vmm)
	}
	if err == nil {
		s.host, err = listenUnix(cfg.Path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for vsock device: %w", err), s.close())
	}
	return s, nil
}

// listenUnix makes a socket that only this user may connect to.
func listenUnix(path string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (s *Server) close() error {
	s.cancel()
	var errs []error
	for _, l := range []*net.UnixListener{s.vmm, s.host} {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

// Conns is the number of open connections.
func (s *Server) Conns() int { return s.dev.Conns() }

// Serve serves VMMs, one after another, and clients until ctx ends. Then all
// connections are closed and the sockets are gone; the error is nil unless
// something else ended it.
func (s *Server) Serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.front.Serve(ctx, s.vmm) })
	g.Go(func() error { return s.accept(ctx) })
	// A connection that waits for the guest's buffers is let go only by this.
	stop := context.AfterFunc(ctx, s.cancel)
	defer stop()
	err := g.Wait()
	s.cancel()
	s.dev.wg.Wait()
	return err
}

func (s *Server) accept(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.host.Close() }) // AcceptUnix reports it
	defer stop()
	for {
		sock, err := s.host.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return errors.Join(fmt.Errorf("accept vsock client: %w", err), s.host.Close())
		}
		s.dev.wg.Go(func() {
			if err := s.dev.serveHost(sock); err != nil {
				s.cfg.Log.Debug("vsock client", "err", err)
			}
		})
	}
}
