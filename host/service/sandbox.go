package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/distribution/reference"
	"github.com/sirupsen/logrus"
	"golang.org/x/net/netutil"

	"github.com/tatami-containers/tatami/host/class"
	"github.com/tatami-containers/tatami/host/kata"
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
	class     class.Choice
	named     reference.Named // reference, normalised
	lease     *held
	found     *kata.Container // not added by hand; immutable
	args      []string        // of its command; none when they are not known
	start     *start
}

// sandbox is one virtual machine and what it may ask for.
type sandbox struct {
	id    string
	at    place
	s     *Service
	host  *ttrpc.Server
	relay *relay.Relay
	wg    sync.WaitGroup // the two servers, and lookups

	ctx    context.Context // of lookups; ends with the sandbox
	cancel context.CancelFunc
	slots  chan struct{} // one element for each lookup at work
	reads  chan struct{} // one element for each bundle being read
	quiet  quiet         // for what the guest makes the log say

	mu         sync.Mutex
	closed     bool                 // protected by mu
	containers map[string]container // protected by mu
	lookups    map[string]*lookup   // under way, by container; protected by mu
	grants     []relay.Grant        // replaced, never changed; protected by mu
	lost       time.Time            // when its virtio-fs device was lost; zero when there is one, or none; protected by mu
}

func newSandbox(s *Service, id string, at place) (*sandbox, error) {
	box := &sandbox{
		id: id, at: at, s: s, slots: make(chan struct{}, maxLookups), reads: make(chan struct{}, maxReads),
		containers: map[string]container{}, lookups: map[string]*lookup{},
	}
	box.ctx, box.cancel = context.WithCancel(context.Background())
	var err error
	if box.host, err = newServer(); err != nil {
		return nil, err
	}
	api.RegisterHostService(box.host, box)
	box.relay = relay.New(relay.Config{
		Grants: box.granted, Requests: s.cfg.Requests, Stall: s.cfg.Stall,
		Sent: &s.sent, Queue: s.cfg.Sched.Relay(), Log: s.log.With("sandbox", id),
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
	b.mu.Lock()
	b.closed = true // no lookup and no container is added
	b.mu.Unlock()
	b.cancel()
	_ = b.host.Close() // its listener and connections; nothing to add
	b.relay.Shutdown(ctx)
	b.s.exports.Drop(b.id)
	b.wg.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.containers {
		c.lease.Close()
	}
	clear(b.containers)
	b.grants = nil
}

// breakOff closes the sandbox and waits for none of its answers.
func (b *sandbox) breakOff() {
	over, cancel := context.WithCancel(context.Background())
	cancel()
	b.close(over)
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
	case ok && old.reference == c.reference && old.class.Class == c.class.Class && old.lease.Manifest() == c.lease.Manifest():
		c.lease.Close() // said twice; the first lease stays
		return nil
	case ok:
		return fmt.Errorf("container %s of sandbox %s runs %s already: %w", c.id, b.id, old.reference, errdefs.ErrAlreadyExists)
	case len(b.containers) >= maxContainers:
		return fmt.Errorf("sandbox %s has %d containers: %w", b.id, maxContainers, errdefs.ErrResourceExhausted)
	}
	b.containers[c.id] = c
	b.regrant()
	b.s.notes.addContainer(b.id, c.note())
	return nil
}

// remove gives back what a container held.
func (b *sandbox) remove(id string) {
	b.mu.Lock()
	c, ok := b.containers[id]
	gone := false
	if ok {
		delete(b.containers, id)
		b.regrant()
		b.s.notes.dropContainer(b.id, id)
		gone = !b.has(c.lease.Manifest())
	}
	b.mu.Unlock()
	if !ok {
		return
	}
	if gone {
		b.s.exports.Gone(b.id, c.lease.Manifest())
	}
	c.lease.Close()
}

// regrant lets the relay serve the images of all containers. Precondition: b.mu
// is held.
func (b *sandbox) regrant() {
	b.grants = make([]relay.Grant, 0, len(b.containers))
	for _, c := range b.containers {
		b.grants = append(b.grants, c.grant())
	}
}

func (c container) grant() relay.Grant {
	g := relay.Grant{
		Domain: reference.Domain(c.named), Repository: reference.Path(c.named),
		Manifest: c.lease.Manifest(), Image: c.lease, Flow: c.lease.Flow(),
	}
	if tagged, ok := c.named.(reference.Tagged); ok {
		g.Tag = tagged.Tag()
	}
	return g
}

func (c container) note() containerNote {
	return containerNote{ID: c.id, Reference: c.reference, Class: c.class.Class, Reason: c.class.Reason, Manifest: c.lease.Manifest(), Found: c.found != nil}
}

// writeDown notes the sandbox for the next process.
func (b *sandbox) writeDown() {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := note{ID: b.id, Host: b.at.host, Relay: b.at.relay, CID: b.at.cid, Found: b.at.found}
	for _, c := range b.containers {
		n.Containers = append(n.Containers, c.note())
	}
	b.s.notes.put(n)
}

// Describe implements the Host service.
func (b *sandbox) Describe(ctx context.Context, req *api.DescribeRequest) (*api.DescribeResponse, error) {
	c, ok := b.container(req.ContainerId)
	if !ok && b.at.found {
		if err := b.lookUp(ctx, req.ContainerId); err != nil {
			return nil, err
		}
		c, ok = b.container(req.ContainerId)
	}
	if !ok {
		return nil, unknownContainer(req.ContainerId)
	}
	out := &api.DescribeResponse{
		Reference: c.reference, Repository: reference.Path(c.named),
		ManifestDigest: c.lease.Manifest().String(), Class: c.class.Class, Trust: trust,
	}
	b.describeStart(c, out)
	return out, nil
}

// unknownContainer is what a guest is told of containers that do not exist and
// of those of others.
func unknownContainer(id string) error {
	return fmt.Errorf("container %.64q is not known for this sandbox: the node must be told of it (Node.AddContainer), or find it in containerd's bundle, before the guest asks: %w",
		id, errdefs.ErrNotFound)
}

func (b *sandbox) container(id string) (container, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c, ok := b.containers[id]
	return c, ok
}

// newContainer checks what the node was told of a container.
func newContainer(id, ref string, class class.Choice) (container, error) {
	if id == "" || len(id) > maxSandbox {
		return container{}, fmt.Errorf("give a container id of 1 to %d bytes: %w", maxSandbox, errdefs.ErrInvalidArgument)
	}
	named, err := image.ParseReference(ref)
	return container{id: id, reference: ref, class: class, named: named, start: newStart()}, err
}
