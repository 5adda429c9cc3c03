package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/mounts"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/host/service"
	"github.com/tatami-containers/tatami/host/snapshotter"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// stopGrace is how long calls of containerd may take when a worker ends.
const stopGrace = 10 * time.Second

func runWorker(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	link, err := session.Inherit()
	if err != nil {
		return err
	}
	extra := link.Extra() // as in supervise
	if len(extra) == 0 {
		return errors.Join(fmt.Errorf("a worker of tatami-host is started by its supervisor only: %w", errdefs.ErrFailedPrecondition), link.Close())
	}
	readies := extra[len(extra)-1]
	defer readies.Close()
	listeners, err := inheritedListeners(extra[:len(extra)-1])
	if err == nil {
		// The supervisor may have read the settings before they were changed.
		err = sameSockets(addresses(listeners), socketPaths(cfg))
	}
	if err != nil {
		return errors.Join(err, link.Close())
	}
	beside := service.Beside{Control: listeners[0], Ready: func() { sayReady(readies, log) }, Open: func(ctx context.Context, n *node.Node) (service.Local, error) {
		return openLocal(ctx, cfg, n, link, listeners[1:], log)
	}}
	return errors.Join(service.Run(ctx, cfg, beside, log), link.Close())
}

func inheritedListeners(files []*os.File) (all []net.Listener, err error) {
	for _, f := range files {
		l, err := net.FileListener(f)
		_ = f.Close() // the listener has its own
		if err != nil {
			return nil, fmt.Errorf("inherited socket %s: %w", f.Name(), err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // it is the supervisor's
		}
		all = append(all, l)
	}
	return all, nil
}

// addresses are the paths at which unix sockets listen.
func addresses(listeners []net.Listener) (paths []string) {
	for _, l := range listeners {
		paths = append(paths, l.Addr().String())
	}
	return paths
}

// local is what uses images on the node itself: containerd's snapshotters, and
// the mounts that they need.
type local struct {
	cfg       config.Config
	log       *slog.Logger
	mounter   *mount.Mounter
	listeners []net.Listener // as cfg.Snapshotters
	all       []*snapshotter.Snapshotter

	endReads func()     // ends the answering of reads
	reads    chan error // how that ended
}

func openLocal(ctx context.Context, cfg config.Config, n *node.Node, link *session.Link, listeners []net.Listener, log *slog.Logger) (_ *local, err error) {
	l := &local{cfg: cfg, log: log, listeners: listeners, reads: make(chan error, 1)}
	if l.mounter, err = mount.New(mount.Config{StateDir: cfg.State, Link: link, Prefer: mountPath(), Log: log}); err != nil {
		return nil, err
	}
	images, err := mounts.New(mounts.Config{Node: n, Mounter: l.mounter, Dir: cfg.State, Log: log})
	if err != nil {
		return nil, err
	}
	reading, endReads := context.WithCancel(context.WithoutCancel(ctx))
	if err := l.mounter.Restore(ctx, images.Reopen(reading)); err != nil {
		endReads()
		return nil, fmt.Errorf("take over mounts: %w", err)
	}
	l.endReads = endReads
	go func() { l.reads <- l.mounter.Serve(reading) }()
	err = images.Collect(ctx)
	if err == nil {
		err = l.openSnapshotters(ctx, images)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *local) openSnapshotters(ctx context.Context, images *mounts.Mounts) error {
	root := filepath.Join(l.cfg.Root, "snapshotter")
	owners, err := snapshotter.OpenOwners(filepath.Join(l.cfg.Root, "owners"), images, l.log)
	if err != nil {
		return err
	}
	for _, c := range l.cfg.Snapshotters {
		s, err := snapshotter.Open(ctx, snapshotter.Config{
			Root: filepath.Join(root, c.Name), Name: c.Name, Mode: snapshotter.Mode(c.Mode),
			Allow: modes(c.Allow), Fallback: modes(c.Fallback), UpperSize: int64(c.UpperSize),
			MountHelper: l.cfg.MountHelper, Images: images, Owners: owners, Log: l.log.With("snapshotter", c.Name),
		})
		if err != nil {
			return fmt.Errorf("open snapshotter %s: %w", c.Name, err)
		}
		l.all = append(l.all, s)
	}
	return nil
}

func modes(names []string) (out []snapshotter.Mode) {
	for _, n := range names {
		out = append(out, snapshotter.Mode(n))
	}
	return out
}

// Serve implements service.Local.
func (l *local) Serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, s := range l.all {
		g.Go(func() error { return l.serve(ctx, s, l.listeners[i]) })
	}
	g.Go(func() error {
		select {
		case err := <-l.reads:
			l.reads <- err
			return fmt.Errorf("reads of mounted images: %w", err)
		case <-ctx.Done():
			return nil
		}
	})
	return g.Wait()
}

// serve answers containerd on one socket until ctx ends. Calls under way are
// broken off after a while.
func (l *local) serve(ctx context.Context, s *snapshotter.Snapshotter, listener net.Listener) error {
	server := grpc.NewServer()
	s.Register(server)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		force := time.AfterFunc(stopGrace, server.Stop)
		defer force.Stop()
		server.GracefulStop()
	})
	err := server.Serve(listener)
	if !stop() { // ctx has ended
		<-stopped
	}
	if err != nil {
		return fmt.Errorf("serve snapshotter: %w", err)
	}
	return nil
}

// Close implements service.Local. Mounts stay: the next worker has them.
func (l *local) Close() error {
	var errs []error
	for _, s := range l.all {
		errs = append(errs, s.Close())
	}
	l.endReads()
	return errors.Join(append(errs, <-l.reads)...)
}
