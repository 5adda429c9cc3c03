package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/guest/config"
	"github.com/tatami-containers/tatami/guest/images"
	"github.com/tatami-containers/tatami/guest/service"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/unpack"
)

// heapRoom is the memory of the worker besides the store's, in bytes. It shares
// the machine with containers. Collecting garbage sooner than Go does by itself
// saves nothing: what is alive is the store's.
const heapRoom = 24 << 20

// What a whole layer is pulled with: several are at a time, and each buffers
// pullChunk*pullRanges bytes.
const (
	pullChunk  = 2 << 20
	pullRanges = 4
)

// worker serves until it dies; the next one takes over.
type worker struct {
	cfg     *config.Config
	log     *slog.Logger
	link    *session.Link
	store   *store.Store
	mounter *mount.Mounter
	guest   *service.Guest
	clients []*registry.Client
}

func runWorker(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	debug.SetMemoryLimit(cfg.StoreMemory + heapRoom)
	link, err := session.Inherit()
	if err != nil {
		return err
	}
	w := &worker{cfg: cfg, log: log, link: link}
	if err := w.open(); err != nil {
		return errors.Join(err, w.close())
	}
	return errors.Join(w.serve(ctx), w.close())
}

// open builds everything and takes over the mounts of the worker before.
func (w *worker) open() (err error) {
	dir := w.cfg.StoreDir
	if dir == "" {
		dir = filepath.Join(w.cfg.StateDir, "store")
	}
	keep := w.cfg.StoreDir != ""
	if w.store, err = store.Open(store.Config{Dir: dir, Keep: keep, Memory: w.cfg.StoreMemory, Stall: nodeStall, Patience: nodePatience, Log: w.log}); err != nil {
		return err
	}
	unpacked, err := unpack.Open(unpackedDir(w.cfg), w.log)
	if err != nil {
		return err
	}
	if w.mounter, err = mount.New(mount.Config{StateDir: w.cfg.StateDir, Link: w.link, Prefer: preferred(w.cfg.MountPath, keep), Log: w.log}); err != nil {
		return err
	}
	w.guest = service.New(service.Config{
		Images: images.New(w.imagesConfig()), Store: w.store, Keep: keep, Mounter: w.mounter, Unpacked: unpacked,
		StateDir: w.cfg.StateDir, Version: version(), Restarts: w.link.Restarts(), Log: w.log,
	})
	return nil
}

// nodeStall is after how long without a byte the node is given up: the node
// itself tries a registry several times meanwhile.
const nodeStall = 90 * time.Second

// nodePatience is how long reads wait for a node that is away, as while it is
// upgraded, before they fail.
const nodePatience = time.Minute

// preferred is the loop device where images will be complete some day: only
// that can then be switched to a local file.
func preferred(path string, keep bool) mount.Path {
	switch {
	case path != "auto":
		return mount.Path(path)
	case keep:
		return mount.LoopPath
	}
	return ""
}

func (w *worker) imagesConfig() images.Config {
	c := images.Config{
		Trust: images.Trust(w.cfg.Trust), PreferRegistry: w.cfg.RegistryAddr != "",
		LayersDir: filepath.Join(w.cfg.StateDir, "layers"), Log: w.log,
	}
	if w.cfg.VirtioFS != "off" {
		c.Shared = w.cfg.VirtioFSDirs
	}
	if w.cfg.HostAddress != "" {
		c.Host = hostClient{w.cfg.HostAddress}
	}
	if w.cfg.RelayAddress != "" {
		c.Relay = w.client(w.cfg.RelayAddress, func(string) bool { return true })
	}
	if w.cfg.Registry {
		c.Registry = w.client(w.cfg.RegistryAddr, registry.PlainHTTPHosts(w.cfg.PlainHTTP))
	}
	return c
}

// client makes a registry client that dials addr, whatever it is asked for, or
// the network when addr is empty.
func (w *worker) client(addr string, plain func(string) bool) *registry.Client {
	rc := registry.Config{PlainHTTP: plain, UserAgent: "tatami-guest", Chunk: pullChunk, InFlight: pullRanges, Log: w.log}
	if addr != "" {
		rc.Stall = nodeStall
		rc.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) { return vsock.Dial(ctx, addr) }
	} else {
		rc.Credentials = registry.DockerCredentials()
	}
	c := registry.New(rc)
	w.clients = append(w.clients, c)
	return c
}

// serve answers reads and calls until ctx ends or one of the two cannot go on.
func (w *worker) serve(ctx context.Context) error {
	listeners, err := w.listeners()
	if err != nil {
		return err
	}
	srv, err := w.server(ctx)
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	if err := w.mounter.Restore(gctx, w.guest.Reopen(gctx)); err != nil {
		return fmt.Errorf("take over mounts: %w", err)
	}
	reading, endReading := context.WithCancel(context.WithoutCancel(ctx))
	defer endReading()
	g.Go(func() error { return w.mounter.Serve(reading) })
	g.Go(func() error { return w.guest.Watch(gctx) })
	g.Go(func() error { return w.guest.SwitchComplete(gctx) })
	for _, l := range listeners {
		srv.start(context.WithoutCancel(ctx), l)
	}
	w.log.Info("serving", "restarts", w.link.Restarts(), "mounts", len(w.mounter.List()))
	<-gctx.Done()
	srv.stop() // before reading ends: calls may read
	endReading()
	return g.Wait()
}

// listeners are those of the supervisor.
func (w *worker) listeners() (all []net.Listener, err error) {
	for _, f := range w.link.Extra() {
		l, err := inherited(f)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

// server offers Guest, and Runner where the supervisor has it.
func (w *worker) server(ctx context.Context) (*server, error) {
	srv, err := newServer(w.log)
	if err != nil {
		return nil, err
	}
	api.RegisterGuestService(srv.Server, w.guest)
	if !w.cfg.Runner {
		return srv, nil
	}
	cl, err := dial(ctx, "unix:"+runnerSocket(w.cfg))
	if err != nil {
		return nil, fmt.Errorf("reach the supervisor: %w", err)
	}
	api.RegisterRunnerService(srv.Server, &service.Runner{RunnerService: api.NewRunnerClient(cl), Guest: w.guest})
	return srv, nil
}

// close lets go of everything; mounts stay.
func (w *worker) close() error {
	var errs []error
	if w.guest != nil {
		w.guest.Close()
	}
	if w.store != nil {
		errs = append(errs, w.store.Close())
	}
	for _, c := range w.clients {
		errs = append(errs, c.Close())
	}
	if err := w.link.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
