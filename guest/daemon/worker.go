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
	"golang.org/x/sys/unix"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/guest/config"
	"github.com/tatami-containers/tatami/guest/images"
	"github.com/tatami-containers/tatami/guest/service"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
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
	conf := store.Config{Dir: dir, Keep: keep, Hold: keep, Memory: w.cfg.StoreMemory, Stall: nodeStall, Patience: time.Duration(w.cfg.Patience), Log: w.log}
	if keep {
		if conf.Quota, err = storeQuota(dir); err != nil {
			return err
		}
	}
	if w.store, err = store.Open(conf); err != nil {
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
		Images: images.New(w.imagesConfig()), Store: w.store, Keep: keep, Mounter: w.mounter, Unpacked: unpacked, Starts: w.starts(),
		StateDir: w.cfg.StateDir, Version: version(), Restarts: w.link.Restarts(), Log: w.log,
	})
	return nil
}

// registryStall is after how long without a byte the rest of an answer of a
// registry is asked for again, as tatami-host does.
const registryStall = 10 * time.Second

// storeShare is how much of the file system of store_dir the store may take, in per
// cent: something is left for what else the guest has there.
const storeShare = 90

// storeQuota is that share in bytes.
func storeQuota(dir string) (int64, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("find out how large the disk of store_dir %s is: %w", dir, err)
	}
	return int64(st.Blocks) * st.Bsize / 100 * storeShare, nil
}

// nodeStall is after how long without a byte the node is given up: the node
// itself tries a registry several times meanwhile.
const nodeStall = 90 * time.Second

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
		c.Relay = w.client(w.cfg.RelayAddress, func(string) bool { return true }, nil)
	}
	if w.cfg.Registry {
		c.Registry = w.client(w.cfg.RegistryAddr, registry.PlainHTTPHosts(w.cfg.PlainHTTP), w.credentials())
	}
	return c
}

// starts is whom to tell how containers start; nil for nobody.
func (w *worker) starts() service.Recorder {
	if !w.cfg.Profile || w.cfg.HostAddress == "" {
		return nil
	}
	return hostClient{w.cfg.HostAddress}
}

// credentials are the guest's own, for registries. kata-agent starts processes without
// $HOME where systemd started it so; then there is no default place.
func (w *worker) credentials() auth.CredentialFunc {
	paths := w.cfg.Credentials
	if len(paths) == 0 {
		dir := os.Getenv("DOCKER_CONFIG")
		if home, err := os.UserHomeDir(); dir == "" && err == nil {
			dir = filepath.Join(home, ".docker")
		}
		if dir == "" {
			return nil
		}
		paths = []string{filepath.Join(dir, "config.json")}
	}
	var sources []credentials.Source
	for _, path := range paths {
		sources = append(sources, credentials.File(path))
	}
	return credentials.Chain(w.log, sources...)
}

// client makes a registry client that dials addr, whatever it is asked for, or
// the network when addr is empty.
func (w *worker) client(addr string, plain func(string) bool, creds auth.CredentialFunc) *registry.Client {
	rc := registry.Config{
		PlainHTTP: plain, Credentials: creds, UserAgent: "tatami-guest", Chunk: pullChunk, InFlight: pullRanges, Log: w.log,
	}
	if addr != "" {
		rc.Stall, rc.Hedge = nodeStall, -1 // the node asks elsewhere itself
		rc.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) { return vsock.Dial(ctx, addr) }
	} else {
		rc.Stall = registryStall
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
