// Package service is tatami-host: the Node service on the control socket, and
// for each sandbox the Host service and the relay on addresses of its own. What
// a sandbox may ask for is known from where it connects: nothing that a guest
// says about itself counts.
//
// Locks: Service.mu, then sandbox.mu, then notes.mu, under which a file is
// written. ports.mu and held.mu are leaves. None is held while an image is
// prepared or a sandbox is closed.
package service

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/class"
	"github.com/tatami-containers/tatami/host/export"
	"github.com/tatami-containers/tatami/host/kata"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Config of a Service.
type Config struct {
	Node     *node.Node
	Rules    *class.Rules     // choose classes; those of a node without settings when nil
	Sched    *sched.Scheduler // whose turn it is; everybody's when nil
	Schedule sched.Config     // what Sched was made of
	Requests int              // of one sandbox served at a time
	Stall    time.Duration    // how long a sandbox may take nothing of an answer
	// Notes is the file in which sandboxes and their containers are noted; none
	// when empty. What a killed process has left of them is removed.
	Notes string
	// Restore lets sandboxes outlive this process: the next one attaches those
	// that were attached by hand, in Restore, and those that it finds again.
	Restore bool
	// Discovery finds sandboxes by themselves; none are found when nil.
	Discovery *Discovery
	Log       *slog.Logger
	// Local is what else uses the node; nil when nothing does.
	Local Local
	// Profile is of start-up profiles.
	Profile Profile
}

// maxSandbox bounds an id in bytes.
const maxSandbox = 256

// Service holds the attached sandboxes.
type Service struct {
	cfg     Config
	log     *slog.Logger
	ports   *ports
	notes   *notes
	sent    atomic.Int64 // body bytes of all relays
	running atomic.Bool  // the control socket is served

	exports *export.Server // of virtio-fs devices
	serving sync.WaitGroup // exports

	watcher *kata.Watcher // nil without discovery
	bundles *kata.Bundles
	ctx     context.Context // of looking for sandboxes; ends with close
	cancel  context.CancelFunc
	misses  misses // context IDs that are nobody's

	mu        sync.Mutex
	closed    bool                // protected by mu
	sandboxes map[string]*sandbox // nil while being attached; protected by mu
}

// New returns a Service without sandboxes and removes what sockets an earlier
// process left behind.
func New(cfg Config) *Service {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Rules == nil {
		cfg.Rules = standardRules()
	}
	s := &Service{cfg: cfg, log: cfg.Log, sandboxes: map[string]*sandbox{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.ports = newPorts(vsock.Listen, vsock.PeerCID)
	s.exports = export.New(export.Config{
		Open: s.openImage, Left: s.left, Requests: cfg.Requests, Stall: cfg.Stall,
		Queue: cfg.Sched.Relay(), Log: cfg.Log,
	})
	s.notes = openNotes(cfg.Notes, cfg.Log)
	s.removeLeftovers()
	s.forgetOthers()
	if cfg.Discovery != nil {
		s.discover(*cfg.Discovery)
	}
	return s
}

// forgetOthers drops the notes that this process has no use for.
func (s *Service) forgetOthers() {
	for _, n := range s.notes.list() {
		if !s.cfg.Restore || n.Found && s.cfg.Discovery == nil {
			s.notes.drop(n.ID)
		}
	}
}

// Restore attaches the sandboxes that were attached by hand to the process
// before this one. What cannot be restored is logged and left out.
func (s *Service) Restore() {
	for _, n := range s.notes.list() {
		if n.Found {
			continue // until it is found again
		}
		if err := s.attach(n.ID, n.place()); err != nil {
			s.log.Warn("a sandbox of the process before this one is lost: attach it again", "sandbox", n.ID, "error", err)
			s.notes.drop(n.ID)
		}
	}
}

// place is where a sandbox is served.
type place struct {
	host, relay string // addresses
	cid         uint32 // who may connect to a shared one
	found       bool   // not attached by hand
}

// attach opens the Host service and the relay for a sandbox. What the process
// before this one knew of a sandbox at this very place it is given back.
func (s *Service) attach(id string, at place) error {
	if id == "" || len(id) > maxSandbox {
		return fmt.Errorf("attach: give a sandbox id of 1 to %d bytes: %w", maxSandbox, errdefs.ErrInvalidArgument)
	}
	if err := s.reserve(id); err != nil {
		return err
	}
	box, err := s.open(id, at)
	if err == nil {
		err = s.install(id, box)
	}
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.sandboxes, id)
		return fmt.Errorf("attach sandbox %s: %w", id, err)
	}
	s.log.Info("sandbox attached", "sandbox", id, "host", at.host, "relay", at.relay)
	return nil
}

// install makes a reserved sandbox known.
func (s *Service) install(id string, box *sandbox) error {
	s.mu.Lock()
	stopping := s.closed
	if !stopping {
		s.sandboxes[id] = box
		box.writeDown()
	}
	s.mu.Unlock()
	if stopping {
		box.breakOff()
		return errStopping
	}
	return nil
}

var errStopping = fmt.Errorf("the node is stopping: %w", errdefs.ErrUnavailable)

func (s *Service) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("attach sandbox %s: %w", id, errStopping)
	}
	if _, ok := s.sandboxes[id]; ok {
		return fmt.Errorf("sandbox %s is attached already: detach it first or choose another id: %w", id, errdefs.ErrAlreadyExists)
	}
	s.sandboxes[id] = nil
	return nil
}

// open listens and serves. Containers are given back before anybody can ask
// for them: a guest that reads takes a refusal for an answer.
func (s *Service) open(id string, at place) (*sandbox, error) {
	box, err := newSandbox(s, id, at)
	if err != nil {
		return nil, err
	}
	for _, c := range s.notes.containers(id, at) {
		if err := box.restore(c); err != nil {
			s.log.Warn("a container is not restored", "sandbox", id, "container", c.ID, "reference", c.Reference, "error", err)
		}
	}
	host, err := s.listen(at.host, at)
	if err != nil {
		box.breakOff()
		return nil, err
	}
	relay, err := s.listen(at.relay, at)
	if err != nil {
		_ = host.Close() // nobody has connected; the error that counts is err
		box.breakOff()
		return nil, err
	}
	box.serve(host, relay)
	return box, nil
}

// listen opens one address of a sandbox. Hybrid sockets of found sandboxes are
// connected to by VMMs that may run as other users.
func (s *Service) listen(addr string, at place) (net.Listener, error) {
	a, err := vsock.ParseAddress(addr)
	if err == nil && at.found && a.Network == vsock.Hybrid {
		return kata.Listen(a.Path, a.Port)
	}
	return s.ports.listen(addr, at.cid) // which also refuses what cannot be parsed
}

// detach closes a sandbox. Its answers under way are broken off when ctx ends.
func (s *Service) detach(ctx context.Context, id string) error {
	s.mu.Lock()
	box := s.sandboxes[id]
	if box != nil {
		delete(s.sandboxes, id)
		s.notes.drop(id)
	}
	s.mu.Unlock()
	if box == nil {
		return notAttached(id)
	}
	box.close(ctx)
	s.log.Info("sandbox detached", "sandbox", id)
	return nil
}

func notAttached(id string) error {
	return fmt.Errorf("sandbox %s is not attached: %w", id, errdefs.ErrNotFound)
}

func (s *Service) find(id string) (*sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if box := s.sandboxes[id]; box != nil {
		return box, nil
	}
	return nil, notAttached(id)
}

// attached is the number of sandboxes.
func (s *Service) attached() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sandboxes)
}

// addContainer lets a sandbox ask for a container and read its image, which is
// prepared unless it was.
func (s *Service) addContainer(ctx context.Context, id string, c container, platform string) (digest.Digest, error) {
	box, err := s.find(id)
	if err != nil {
		return "", err
	}
	lease, err := s.lease(box.working(ctx, c.class), c.reference, platform)
	if err != nil {
		return "", err
	}
	return lease.Manifest(), box.adopt(c, lease)
}

// adopt adds a container with its lease, which it takes over.
func (b *sandbox) adopt(c container, lease *node.Lease) error {
	lease.SetFlow(b.flow(c.class))
	lease.Replay(c.args)
	c.lease = &held{Lease: lease}
	if err := b.add(c); err != nil {
		lease.Close()
		return err
	}
	if lease.Flow().Class().Fill {
		lease.FillAfterStart()
	}
	b.s.log.Info("container added", "sandbox", b.id, "container", c.id, "reference", c.reference, "manifest", lease.Manifest(), "class", c.class.Class, "because", c.class.Reason)
	return nil
}

func (s *Service) lease(ctx context.Context, reference, platform string) (*node.Lease, error) {
	lease, err := s.cfg.Node.Lease(ctx, reference, platform)
	if !errdefs.IsNotFound(err) {
		return lease, err
	}
	if _, err := s.cfg.Node.Prepare(ctx, reference, platform); err != nil {
		return nil, err
	}
	return s.cfg.Node.Lease(ctx, reference, platform)
}

// close detaches all sandboxes; no other is attached. With Restore they stay
// noted for the next process.
func (s *Service) close(ctx context.Context) {
	s.cancel()
	if s.cfg.Restore { // guests read on what they have
		s.cfg.Node.KeepShares()
	}
	s.exports.Close() // before sandboxes: to a device this is a pause, not the end of its images
	s.serving.Wait()
	s.mu.Lock()
	s.closed = true
	boxes := s.sandboxes
	s.sandboxes = map[string]*sandbox{}
	if !s.cfg.Restore {
		s.notes.drop(slices.Collect(maps.Keys(boxes))...)
	}
	s.mu.Unlock()
	var wg sync.WaitGroup
	for _, box := range boxes {
		if box != nil {
			wg.Go(func() { box.close(ctx) })
		}
	}
	wg.Wait()
	s.ports.close()
}
