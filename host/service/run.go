package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/mirror"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/host/pods"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials/kube"
	"github.com/tatami-containers/tatami/rootfs/registry/hosts"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// How long calls and answers under way may take when the program ends.
const (
	callGrace   = 10 * time.Second
	answerGrace = 5 * time.Second
)

// rangeBytes is how much of a layer one request asks for, in bytes. A stream
// keeps Registry.Ranges of them in memory.
const rangeBytes = 4 << 20

// firstGrace is how long a program with IdleExit waits for its first
// connection.
const firstGrace = time.Minute

// registryStall is after how long without a byte a connection to a registry is
// given up for another one: before the store gives the registry up, which is
// before a guest gives the node up.
const registryStall = 10 * time.Second

// Beside is what else a program does with the node.
type Beside struct {
	// Control is the control socket, if it is open already.
	Control net.Listener
	// Images is the socket of virtio-fs devices, if it is open already.
	Images *net.UnixListener
	// Open starts it; nil when there is nothing.
	Open func(ctx context.Context, n *node.Node, c Classes) (Local, error)
	// Credentials are sources that come before those of the settings.
	Credentials []credentials.Source
	// Ready is called when everything serves; may be nil.
	Ready func()
}

// Local uses the images of the node on the node itself.
type Local interface {
	Containers
	// Serve answers until ctx ends.
	Serve(ctx context.Context) error
	// Status tells what it does.
	Status(ctx context.Context) ([]*api.SnapshotterStatus, error)
	// Close gives back everything but what shall outlive this process.
	Close() error
}

// Run serves the node until ctx ends, or, with IdleExit, until nothing uses it
// any more. Then it lets calls under way finish, for a while, and makes the
// store durable.
func Run(ctx context.Context, cfg config.Config, beside Beside, log *slog.Logger) (err error) {
	lock, err := lockRoot(cfg.Root, cfg.Socket)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	front, err := newFront()
	if err != nil {
		return err
	}
	// Connections are closed last: the answers of the last calls are on their way.
	defer func() { err = errors.Join(err, front.server.Close()) }()
	sources, err := openSources(cfg.Registry, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sources.Close()) }()
	rules, err := cfg.Rules()
	if err != nil {
		return err
	}
	schedule := cfg.Scheduling()
	turns, err := sched.New(schedule)
	if err != nil {
		return err
	}
	client := newClient(cfg, slices.Concat(beside.Credentials, sources), turns, log)
	defer func() { err = errors.Join(err, client.Close()) }()
	n, err := openNode(cfg, client, turns, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	defer startMirror(ctx, cfg, n, turns, log)()
	conf := Config{
		Node: n, Rules: rules, Sched: turns, Schedule: schedule, Requests: cfg.Relay.Requests, Stall: time.Duration(cfg.Relay.Stall),
		Notes: filepath.Join(cfg.Root, "sandboxes.json"), Restore: !cfg.IdleExit,
		Discovery: DiscoveryOf(cfg.Kata), Log: log,
		Profile: Profile{Record: time.Duration(cfg.Profile.Record), Budget: int64(cfg.Profile.Budget)},
	}
	known, err := pods.New(cfg.Kata.ContainerdSocket(), log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, known.Close()) }()
	if conf.Discovery != nil {
		conf.Discovery.Pods = known
	}
	if beside.Open == nil {
		return runService(ctx, conf, cfg, front, beside)
	}
	if conf.Local, err = beside.Open(ctx, n, Classes{Rules: rules, Sched: turns, Pods: known}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conf.Local.Close()) }()
	if conf.Discovery != nil {
		conf.Discovery.Containers = conf.Local
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return conf.Local.Serve(ctx) })
	g.Go(func() error { return runService(ctx, conf, cfg, front, beside) })
	return g.Wait()
}

func openNode(cfg config.Config, client *registry.Client, turns *sched.Scheduler, log *slog.Logger) (*node.Node, error) {
	return node.Open(node.Config{
		Root: cfg.Root, Registry: client, Layers: cfg.Registry.Layers, Sched: turns,
		Blobs: int64(cfg.Mirror.Blobs), Mirrored: cfg.Mirror.Address != "",
		Quota: cfg.Store.Bytes, High: cfg.Store.High, Low: cfg.Store.Low, Pinned: cfg.Store.Pinned,
		Profiles: node.Profiles{Record: time.Duration(cfg.Profile.Record), Push: cfg.Profile.Push}, Log: log,
	})
}

// runService serves sandboxes and the control socket.
func runService(ctx context.Context, conf Config, cfg config.Config, front *front, beside Beside) (err error) {
	s := New(conf)
	defer s.finish(ctx)
	s.Restore()
	defer releaseStore(conf)()
	if err := s.export(beside.Images, cfg.ImagesSocket); err != nil {
		return err
	}
	if cfg.Kata.Discover {
		defer s.runDiscovery(ctx)()
	}
	defer s.startMetrics(ctx, cfg.Metrics.Address)()
	return s.control(ctx, cfg, front, beside)
}

// foundAfter is when sandboxes of the process before this one have been found again.
const foundAfter = 30 * time.Second

// releaseStore lets the store give bytes up as soon as it is known what is in use. The
// result ends the wait for that.
func releaseStore(conf Config) (end func()) {
	if conf.Discovery == nil {
		conf.Node.Release()
		return func() {}
	}
	t := time.AfterFunc(foundAfter, conf.Node.Release)
	return func() { t.Stop() }
}

// DiscoveryOf is what the settings say of finding sandboxes; nil when they are
// not to be found.
func DiscoveryOf(k config.Kata) *Discovery {
	if !k.Discover {
		return nil
	}
	return &Discovery{
		RunDirs: k.RunDirs, HostPort: k.HostPort, RelayPort: k.RelayPort, ContainerdState: k.ContainerdState,
	}
}

// finish detaches all sandboxes.
func (s *Service) finish(ctx context.Context) {
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerGrace)
	defer cancel()
	s.close(grace)
}

// openSources returns the places of credentials that the settings name.
func openSources(r config.Registry, log *slog.Logger) (kube.Sources, error) {
	return kube.Open(filepath.SplitList(r.Credentials), r.ProviderBinDir, log)
}

// newClient returns the client of registries and their mirrors.
func newClient(c config.Config, sources []credentials.Source, turns *sched.Scheduler, log *slog.Logger) *registry.Client {
	cfg := anonymous(c, turns, log)
	if len(sources) > 0 { // without any, the client says so
		cfg.Credentials = credentials.Chain(log, sources...)
	}
	return registry.New(cfg)
}

// anonymous is how registries are reached, without credentials.
func anonymous(c config.Config, turns *sched.Scheduler, log *slog.Logger) registry.Config {
	plain := registry.PlainHTTPHosts(c.Registry.PlainHTTP)
	cfg := registry.Config{
		PlainHTTP: plain, UserAgent: "tatami-host", Log: log, Stall: registryStall,
		Chunk: rangeBytes, InFlight: c.Registry.Ranges, Sched: turns,
	}
	if roots := filepath.SplitList(c.Registry.ConfigPath); len(roots) > 0 {
		cfg.Hosts = mirror.Others(c.Mirror.Address, hosts.New(roots, hosts.Options{PlainHTTP: plain, Log: log}).Hosts)
	}
	return cfg
}

// control serves the control socket until there is a reason to stop.
func (s *Service) control(ctx context.Context, cfg config.Config, f *front, beside Beside) (err error) {
	l := beside.Control
	if l == nil {
		if l, err = vsock.Listen("unix:" + cfg.Socket); err != nil {
			return fmt.Errorf("open the control socket: %w", err)
		}
	}
	api.RegisterNodeService(f.server, control{s})
	t := &tracked{Listener: l, idle: make(chan struct{}, 1)}
	ended := make(chan error, 1)
	go func() { ended <- f.server.Serve(context.WithoutCancel(ctx), t) }()
	s.log.Info("tatami-host serves", "root", cfg.Root, "socket", cfg.Socket, "pid", os.Getpid())
	s.running.Store(true)
	if beside.Ready != nil {
		beside.Ready()
	}
	s.wait(ctx, cfg.IdleExit, t, ended)
	s.running.Store(false)
	_ = l.Close() // has no error but that it is closed
	err = <-ended
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), callGrace)
	defer cancel()
	f.drain(grace)
	if !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("serve the control socket: %w", err)
	}
	return nil
}

// wait returns when ctx ends, when the server has ended, or when nothing uses
// the node any more and exit is set.
func (s *Service) wait(ctx context.Context, exit bool, t *tracked, ended chan error) {
	first := time.NewTimer(firstGrace)
	defer first.Stop()
	for {
		select {
		case <-ctx.Done():
			s.log.Info("tatami-host stops", "reason", context.Cause(ctx))
			return
		case err := <-ended:
			ended <- err
			return
		case <-first.C:
		case <-t.idle:
		}
		if exit && t.retire() {
			s.log.Info("tatami-host stops", "reason", "nothing uses it any more")
			return
		}
	}
}

// tracked tells when the last connection of a listener has closed.
type tracked struct {
	net.Listener
	idle chan struct{} // has one element after the last connection closed

	mu      sync.Mutex
	open    int  // protected by mu
	retired bool // no connection counts any more; protected by mu
}

// retire ends the accepting of connections if there is none. A client that
// comes too late sees its connection closed, not a node that is about to end.
func (t *tracked) retire() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retired = t.open == 0
	return t.retired
}

// Accept implements net.Listener.
func (t *tracked) Accept() (net.Conn, error) {
	c, err := t.Listener.Accept()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.retired {
		_ = c.Close() // nothing was said on it
		return nil, net.ErrClosed
	}
	t.open++
	return &trackedConn{Conn: c, t: t}, nil
}

type trackedConn struct {
	net.Conn
	t    *tracked
	once sync.Once
}

// Close implements net.Conn.
func (c *trackedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.t.mu.Lock()
		defer c.t.mu.Unlock()
		if c.t.open--; c.t.open > 0 {
			return
		}
		select {
		case c.t.idle <- struct{}{}:
		default:
		}
	})
	return err
}
