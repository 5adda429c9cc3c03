// Package service is tatami-host: the Node service on the control socket, and
// for each sandbox the Host service and the relay on addresses of its own. What
// a sandbox may ask for is known from where it connects: nothing that a guest
// says about itself counts.
//
// Locks: Service.mu, ports.mu and sandbox.mu are leaves. None is held while an
// image is prepared or a sandbox is closed.
package service

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/protocols/vsock"
)

// Config of a Service.
type Config struct {
	Node     *node.Node
	Class    string        // of containers that do not say
	Requests int           // of one sandbox served at a time
	Stall    time.Duration // how long a sandbox may take nothing of an answer
	// Sockets is the file in which the sockets of sandboxes are noted, to be
	// removed when they are left over; none when empty.
	Sockets string
	Log     *slog.Logger
}

// maxSandbox bounds an id in bytes.
const maxSandbox = 256

// Service holds the attached sandboxes.
type Service struct {
	cfg   Config
	log   *slog.Logger
	ports *ports
	sent  atomic.Int64 // body bytes of all relays

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
	s := &Service{cfg: cfg, log: cfg.Log, sandboxes: map[string]*sandbox{}}
	s.ports = newPorts(vsock.Listen, vsock.PeerCID)
	s.removeLeftovers()
	return s
}

// place is where a sandbox is served.
type place struct {
	host, relay string // addresses
	cid         uint32 // who may connect to a shared one
}

// attach opens the Host service and the relay for a sandbox.
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
		s.noteSockets()
	}
	s.mu.Unlock()
	if stopping {
		over, cancel := context.WithCancel(context.Background())
		cancel()
		box.close(over)
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

// open listens and serves.
func (s *Service) open(id string, at place) (*sandbox, error) {
	host, err := s.ports.listen(at.host, at.cid)
	if err != nil {
		return nil, err
	}
	relay, err := s.ports.listen(at.relay, at.cid)
	if err != nil {
		_ = host.Close() // nobody has connected; the error that counts is err
		return nil, err
	}
	box, err := newSandbox(s, id, at)
	if err != nil {
		_, _ = host.Close(), relay.Close() // as above
		return nil, err
	}
	box.serve(host, relay)
	return box, nil
}

// detach closes a sandbox. Its answers under way are broken off when ctx ends.
func (s *Service) detach(ctx context.Context, id string) error {
	s.mu.Lock()
	box := s.sandboxes[id]
	if box != nil {
		delete(s.sandboxes, id)
		s.noteSockets()
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
	lease, err := s.lease(ctx, c.reference, platform)
	if err != nil {
		return "", err
	}
	c.lease = lease
	if err := box.add(c); err != nil {
		lease.Close()
		return "", err
	}
	s.log.Info("container added", "sandbox", id, "container", c.id, "reference", c.reference, "manifest", lease.Manifest(), "class", c.class)
	return lease.Manifest(), nil
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

// close detaches all sandboxes; no other is attached.
func (s *Service) close(ctx context.Context) {
	s.mu.Lock()
	s.closed = true
	boxes := s.sandboxes
	s.sandboxes = map[string]*sandbox{}
	s.noteSockets()
	s.mu.Unlock()
	var wg sync.WaitGroup
	for _, box := range boxes {
		if box != nil {
			wg.Go(func() { box.close(ctx) })
		}
	}
	wg.Wait()
	s.ports.wait()
}
