package service

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/kata"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/rootfs/image"
)

// What one sandbox may have under way: containers whose images are prepared,
// and bundles that are read, into memory. Others wait.
const (
	maxLookups = 8
	maxReads   = 2
)

// Containers knows which image a container runs.
type Containers interface {
	// Lookup returns the image of a container; ErrNotFound when it is not known.
	Lookup(ctx context.Context, container string) (Image, error)
}

// Image is what a container runs.
type Image struct {
	Reference   string
	Manifest    digest.Digest // "" when the reference is not pinned
	Snapshotter string        // that has it; "" for none of the node's own
}

// lookup is one container being looked up, for all who ask for it.
type lookup struct {
	done chan struct{} // closed when err is set
	err  error
}

// lookUp finds out what a container of a found sandbox runs and adds it. The
// work goes on when ctx ends: the guest will ask again. The error is for the
// guest and says nothing of others or of the registry.
func (b *sandbox) lookUp(ctx context.Context, id string) error {
	owned, err := b.owned(ctx, id)
	if err != nil {
		return err
	}
	l, err := b.join(owned)
	if err != nil {
		return err
	}
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// owned reads whose a container is. The error is for the guest.
func (b *sandbox) owned(ctx context.Context, id string) (kata.Container, error) {
	select {
	case b.reads <- struct{}{}:
		defer func() { <-b.reads }()
	case <-ctx.Done():
		return kata.Container{}, context.Cause(ctx)
	}
	c, err := b.s.bundles.Owned(b.id, id)
	switch {
	case err == nil:
		return c, nil
	case errdefs.IsNotFound(err):
		b.quiet.do(func() {
			b.s.log.Warn("a guest asks for a container that is not its own", "sandbox", b.id, "error", err)
		})
		return c, unknownContainer(id)
	}
	b.quiet.do(func() { b.s.log.Error("containerd's bundles cannot be read", "sandbox", b.id, "error", err) })
	return c, fmt.Errorf("container %s cannot be looked up on the node: %w", id, errdefs.ErrUnavailable)
}

// join returns the lookup of a container that is under way, or a new one.
func (b *sandbox) join(c kata.Container) (*lookup, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, notAttached(b.id)
	}
	if l := b.lookups[c.ID]; l != nil {
		return l, nil
	}
	l := &lookup{done: make(chan struct{})}
	b.lookups[c.ID] = l
	b.wg.Go(func() {
		l.err = b.learn(c)
		b.mu.Lock()
		delete(b.lookups, c.ID)
		b.mu.Unlock()
		close(l.done)
	})
	return l, nil
}

// learn prepares a container's image and adds the container.
func (b *sandbox) learn(c kata.Container) error {
	select {
	case b.slots <- struct{}{}:
		defer func() { <-b.slots }()
	case <-b.ctx.Done():
		return notAttached(b.id)
	}
	if _, ok := b.container(c.ID); ok {
		return nil // since the question
	}
	img, err := b.s.imageOf(b.ctx, c)
	if err == nil {
		err = b.addFound(c, img)
	}
	if err == nil {
		return nil
	}
	b.quiet.do(func() {
		b.s.log.Warn("a container cannot be described", "sandbox", b.id, "container", c.ID, "reference", img.Reference, "error", err)
	})
	return fmt.Errorf("container %s: its image cannot be prepared, the log of tatami-host on the node says why: %w", c.ID, errdefs.Resolve(err))
}

// imageOf is what a container runs: as its snapshot says, else as the pod does.
// containerd does not ask a snapshotter for layers that it has from another
// image, so a snapshot may name that one; then the pod's word counts, too.
func (s *Service) imageOf(ctx context.Context, c kata.Container) (img Image, err error) {
	if known := s.cfg.Discovery.Containers; known != nil {
		img, err = known.Lookup(ctx, c.ID)
		if err == nil && sameRepository(img.Reference, c.Image) || err != nil && !errdefs.IsNotFound(err) {
			return img, err
		}
	}
	if _, err := digest.Parse(c.Image); err == nil || c.Image == "" {
		return Image{}, fmt.Errorf("container %s: its bundle names no image (%.128q), and no snapshot is known: %w", c.ID, c.Image, errdefs.ErrNotFound)
	}
	return Image{Reference: c.Image, Snapshotter: img.Snapshotter}, nil
}

// sameRepository says whether the pod's word for its image can stand for ref. A
// pod may name an image by nothing or by an id.
func sameRepository(ref, word string) bool {
	if _, err := digest.Parse(word); err == nil || word == "" {
		return true
	}
	a, aerr := image.ParseReference(ref)
	b, berr := image.ParseReference(word)
	return aerr == nil && berr == nil && a.Name() == b.Name()
}

func (b *sandbox) addFound(found kata.Container, img Image) error {
	c, err := newContainer(found.ID, img.Reference, b.s.classOf(b.ctx, found, img.Snapshotter))
	if err != nil {
		return err
	}
	lease, err := b.s.leasePinned(b.working(b.ctx, c.class), img.Reference, img.Manifest)
	if err != nil {
		return err
	}
	found.Pod = nil // of no more use
	c.found, c.args = &found, found.Args()
	return b.adopt(c, lease)
}

// leasePinned takes a lease on a manifest, or on what ref means now when none is
// given. The image is prepared unless it was.
func (s *Service) leasePinned(ctx context.Context, ref string, manifest digest.Digest) (*node.Lease, error) {
	if manifest == "" {
		// Also resolves a tag again: what it meant to others may be long ago.
		p, err := s.cfg.Node.Prepare(ctx, ref, "")
		if err != nil {
			return nil, err
		}
		return s.cfg.Node.LeaseManifest(ctx, ref, p.Manifest)
	}
	lease, err := s.cfg.Node.LeaseManifest(ctx, ref, manifest)
	if !errdefs.IsNotFound(err) {
		return lease, err
	}
	named, err := image.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	pinned, err := reference.WithDigest(reference.TrimNamed(named), manifest)
	if err != nil {
		return nil, fmt.Errorf("manifest %.128q of %s: %w: %w", manifest, ref, err, errdefs.ErrInvalidArgument)
	}
	if _, err := s.cfg.Node.Prepare(ctx, pinned.String(), ""); err != nil {
		return nil, err
	}
	return s.cfg.Node.LeaseManifest(ctx, ref, manifest)
}

// restore adds a container that the process before this one knew.
// Precondition: the sandbox is not served yet.
func (b *sandbox) restore(n containerNote) error {
	c, err := newContainer(n.ID, n.Reference, b.s.noted(n))
	if err != nil {
		return err
	}
	if n.Found {
		owned, err := b.s.bundles.Owned(b.id, n.ID)
		if err != nil {
			return err
		}
		owned.Pod = nil // of no more use
		c.found, c.args = &owned, owned.Args()
	}
	lease, err := b.s.cfg.Node.LeaseManifest(b.ctx, n.Reference, n.Manifest)
	if err != nil {
		return err
	}
	return b.adopt(c, lease)
}

// dropGone removes the containers whose bundles are gone.
func (b *sandbox) dropGone() {
	for _, c := range b.foundContainers() {
		if b.s.bundles.Gone(*c.found) {
			b.remove(c.id)
			b.s.log.Info("container gone", "sandbox", b.id, "container", c.id)
		}
	}
}

func (b *sandbox) foundContainers() []container {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []container
	for _, c := range b.containers {
		if c.found != nil {
			out = append(out, c)
		}
	}
	return out
}

// quietTime is how often a guest can make the node's log say something.
const quietTime = 10 * time.Second

// quiet lets something be done now and then.
type quiet struct {
	mu   sync.Mutex
	last time.Time // protected by mu
}

func (q *quiet) do(f func()) {
	q.mu.Lock()
	ok := time.Since(q.last) >= quietTime
	if ok {
		q.last = time.Now()
	}
	q.mu.Unlock()
	if ok {
		f()
	}
}
