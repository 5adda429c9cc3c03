package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/criproxy"
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
	memory, files := takeMemory(extra[:len(extra)-1])
	defer memory.Close()
	sockets, err := inheritedSockets(files)
	if err != nil {
		return errors.Join(err, link.Close())
	}
	keys := criproxy.NewKeys(memory, log)
	images, _ := sockets[cfg.ImagesSocket].(*net.UnixListener) // the settings name it, or it is opened here
	beside := service.Beside{
		Control: sockets[cfg.Socket], Images: images, Ready: func() { sayReady(readies, log) },
		Open: func(ctx context.Context, n *node.Node, c service.Classes) (service.Local, error) {
			return openLocal(ctx, cfg, n, link, sockets, keys, newWork(c, cfg.Kata.ContainerdState), log)
		},
	}
	if cfg.CRI.ImageService != "" {
		beside.Credentials = append(beside.Credentials, keys)
	}
	return errors.Join(service.Run(ctx, cfg, beside, log), link.Close())
}

// takeMemory finds the memory of credentials, if there is one, among the supervisor's
// files. The rest are sockets.
func takeMemory(files []*os.File) (*criproxy.Memory, []*os.File) {
	for i, f := range files {
		if f.Name() == memoryName {
			return criproxy.OpenMemory(f), slices.Delete(files, i, i+1)
		}
	}
	return nil, files
}

// inheritedSockets are the supervisor's, by path.
func inheritedSockets(files []*os.File) (map[string]net.Listener, error) {
	all := map[string]net.Listener{}
	for _, f := range files {
		l, err := net.FileListener(f)
		_ = f.Close() // the listener has its own
		if err != nil {
			return nil, fmt.Errorf("inherited socket %s: %w", f.Name(), err)
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // it is the supervisor's
		}
		all[f.Name()] = l
	}
	return all, nil
}

// local is what uses images on the node itself: containerd's snapshotters, and
// the mounts that they need.
type local struct {
	cfg     config.Config
	log     *slog.Logger
	mounter *mount.Mounter
	sockets map[string]net.Listener    // by path
	all     []*snapshotter.Snapshotter // as cfg.Snapshotters
	owners  *snapshotter.Owners
	kubelet *criproxy.Proxy // nil without cri.image_service
	work    *work
	images  *mounts.Mounts

	endReads func()     // ends the answering of reads
	reads    chan error // how that ended
}

func openLocal(ctx context.Context, cfg config.Config, n *node.Node, link *session.Link, sockets map[string]net.Listener, keys *criproxy.Keys, w *work, log *slog.Logger) (_ *local, err error) {
	l := &local{cfg: cfg, log: log, sockets: sockets, work: w, reads: make(chan error, 1)}
	if l.mounter, err = mount.New(mount.Config{StateDir: cfg.State, Link: link, Prefer: mountPath(), Log: log}); err != nil {
		return nil, err
	}
	images, err := mounts.New(mounts.Config{Node: n, Mounter: l.mounter, Dir: cfg.State, Flow: w.flow, Log: log})
	if err != nil {
		return nil, err
	}
	l.images = images
	reading, endReads := context.WithCancel(context.WithoutCancel(ctx))
	if err := l.mounter.Restore(ctx, images.Reopen(reading)); err != nil {
		endReads()
		return nil, fmt.Errorf("take over mounts: %w", err)
	}
	l.endReads = endReads
	go func() { l.reads <- l.mounter.Serve(reading) }()
	if err := images.Collect(ctx); err != nil {
		log.Warn("what nobody holds stays mounted for now", "error", err)
	}
	err = l.openSnapshotters(ctx, images)
	if err == nil && cfg.CRI.ImageService != "" {
		l.kubelet, err = criproxy.New(criproxy.Config{
			Containerd: cfg.Kata.ContainerdSocket(), Keys: keys, Pulls: &w.pulls, Log: log,
		})
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *local) openSnapshotters(ctx context.Context, images *mounts.Mounts) error {
	root := filepath.Join(l.cfg.Root, "snapshotter")
	var err error
	l.owners, err = snapshotter.OpenOwners(filepath.Join(l.cfg.Root, "owners"), images, l.log)
	if err != nil {
		return err
	}
	for _, c := range l.cfg.Snapshotters {
		s, err := snapshotter.Open(ctx, snapshotter.Config{
			Root: filepath.Join(root, c.Name), Name: c.Name, Mode: snapshotter.Mode(c.Mode),
			Allow: modes(c.Allow), Fallback: modes(c.Fallback), UpperSize: int64(c.UpperSize), Verified: c.ChainIDs == "verified",
			MountHelper: l.cfg.MountHelper, Images: images, Owners: l.owners,
			Pulling: func(ctx context.Context, ref string) context.Context { return l.work.of(ctx, ref, c.Name) }, Log: l.log.With("snapshotter", c.Name),
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
		socket := l.cfg.Snapshotters[i].Socket
		if l.sockets[socket] == nil { // the settings were changed
			l.log.Error("a snapshotter is new since tatami-host was started; restart it", "snapshotter", l.cfg.Snapshotters[i].Name, "socket", socket)
			continue
		}
		g.Go(func() error { return l.serve(ctx, s, l.sockets[socket]) })
	}
	if at := l.cfg.CRI.ImageService; l.kubelet != nil && l.sockets[at] != nil {
		g.Go(func() error { return l.kubelet.Serve(ctx, l.sockets[at]) })
	} else if l.kubelet != nil {
		l.log.Error("the image service is new since tatami-host was started; restart it", "socket", at)
	}
	g.Go(func() error { l.collect(ctx); return nil })
	g.Go(func() error { l.classify(ctx); return nil })
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

// collectEvery is how often images are given up that were in use when their last
// snapshot went: a sandbox gives them back a little later.
const collectEvery = 15 * time.Second

func (l *local) collect(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := l.owners.Collect(ctx); err != nil && ctx.Err() == nil {
			l.log.Warn("images that are not used any more stay for now", "error", err)
		}
	}
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
	if l.kubelet != nil {
		errs = append(errs, l.kubelet.Close())
	}
	l.endReads()
	return errors.Join(append(errs, <-l.reads)...)
}
