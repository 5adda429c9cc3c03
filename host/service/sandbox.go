package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/distribution/reference"
	"github.com/sirupsen/logrus"
	"golang.org/x/net/netutil"

	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/host/relay"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/image"
)

// hostConns bounds a sandbox's connections to the Host service.
const hostConns = 16

// maxContainers bounds the containers of one sandbox.
const maxContainers = 4096

// trust is which index a guest of this node may accept: the one that the node
// made.
const trust = "host"

// container is one container of a sandbox.
type container struct {
	id        string
	reference string // as given to the node
	class     string
	named     reference.Named // reference, normalised
	lease     *node.Lease
}

// sandbox is one virtual machine and what it may ask for.
type sandbox struct {
	id    string
	at    place
	s     *Service
	host  *ttrpc.Server
	relay *relay.Relay
	wg    sync.WaitGroup // the two servers

	mu         sync.Mutex
	closed     bool                 // protected by mu
	containers map[string]container // protected by mu
	grants     []relay.Grant        // replaced, never changed; protected by mu
}

func newSandbox(s *Service, id string, at place) (*sandbox, error) {
	box := &sandbox{id: id, at: at, s: s, containers: map[string]container{}}
	var err error
	if box.host, err = newServer(); err != nil {
		return nil, err
	}
	api.RegisterHostService(box.host, box)
	box.relay = relay.New(relay.Config{
		Grants: box.granted, Requests: s.cfg.Requests, Stall: s.cfg.Stall,
		Sent: &s.sent, Log: s.log.With("sandbox", id),
	})
	return box, nil
}

// serve answers on both listeners until close.
func (b *sandbox) serve(host, relay net.Listener) {
	b.wg.Go(func() {
		err := b.host.Serve(silent(context.Background()), netutil.LimitListener(b.strict(host), hostConns))
		if !errors.Is(err, ttrpc.ErrServerClosed) {
			b.s.log.Error("the Host service of a sandbox ended", "sandbox", b.id, "error", err)
		}
	})
	b.wg.Go(func() {
		if err := b.relay.Serve(relay); err != nil {
			b.s.log.Error("the relay of a sandbox ended", "sandbox", b.id, "error", err)
		}
	})
}

// strict makes a listener one for guests. Only the first refused connection is
// logged: a hostile guest could fill the node's log.
func (b *sandbox) strict(l net.Listener) net.Listener {
	var once sync.Once
	return &strict{Listener: l, stall: cmp.Or(b.s.cfg.Stall, defaultStall), refused: func(err error) {
		once.Do(func() {
			b.s.log.Warn("a connection to the Host service is refused; further ones of this sandbox are not logged", "sandbox", b.id, "error", err)
		})
	}}
}

// silent keeps ttrpc from logging what a guest sends: a hostile one could fill
// the node's log.
func silent(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// close ends both services and gives back the images. Answers under way are
// broken off when ctx ends.
func (b *sandbox) close(ctx context.Context) {
	_ = b.host.Close() // its listener and connections; nothing to add
	b.relay.Shutdown(ctx)
	b.wg.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, c := range b.containers {
		c.lease.Close()
	}
	clear(b.containers)
	b.grants = nil
}

func (b *sandbox) granted() []relay.Grant {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.grants
}

// add takes over the container's lease unless it fails.
func (b *sandbox) add(c container) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return notAttached(b.id)
	}
	old, ok := b.containers[c.id]
	switch {
	case ok && old.reference == c.reference && old.class == c.class && old.lease.Manifest() == c.lease.Manifest():
		c.lease.Close() // said twice; the first lease stays
		return nil
	case ok:
		return fmt.Errorf("container %s of sandbox %s runs %s already: %w", c.id, b.id, old.reference, errdefs.ErrAlreadyExists)
	case len(b.containers) >= maxContainers:
		return fmt.Errorf("sandbox %s has %d containers: %w", b.id, maxContainers, errdefs.ErrResourceExhausted)
	}
	b.containers[c.id] = c
	grant := relay.Grant{
		Domain: reference.Domain(c.named), Repository: reference.Path(c.named),
		Manifest: c.lease.Manifest(), Image: c.lease,
	}
	if tagged, ok := c.named.(reference.Tagged); ok {
		grant.Tag = tagged.Tag()
	}
	b.grants = append(b.grants[:len(b.grants):len(b.grants)], grant)
	return nil
}

// Describe implements the Host service.
func (b *sandbox) Describe(_ context.Context, req *api.DescribeRequest) (*api.DescribeResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c, ok := b.containers[req.ContainerId]
	if !ok {
		return nil, fmt.Errorf("container %.64q is not known for this sandbox: the node must be told of it (Node.AddContainer) before the guest asks: %w",
			req.ContainerId, errdefs.ErrNotFound)
	}
	return &api.DescribeResponse{
		Reference: c.reference, Repository: reference.Path(c.named),
		ManifestDigest: c.lease.Manifest().String(), Class: c.class, Trust: trust,
	}, nil
}

// newContainer checks what the node was told of a container.
func newContainer(id, ref, class string) (container, error) {
	if id == "" || len(id) > maxSandbox {
		return container{}, fmt.Errorf("give a container id of 1 to %d bytes: %w", maxSandbox, errdefs.ErrInvalidArgument)
	}
	if class != "online" && class != "batch" {
		return container{}, fmt.Errorf("class %q: give online or batch: %w", class, errdefs.ErrInvalidArgument)
	}
	named, err := image.ParseReference(ref)
	return container{id: id, reference: ref, class: class, named: named}, err
}
