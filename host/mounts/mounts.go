// Package mounts lets images of the node be used on the node itself: mounted as
// a tree, for the overlays of runc and of Kata's virtiofsd, or as one file, for
// the disks of virtual machines. It is what a snapshotter sees of the node.
//
// Who uses an image is a holder. A record of it is written before anything is
// mounted and removed before anything is unmounted, so that what has no holder
// after a crash is a leftover. The state directory, on a tmpfs:
//
//	holders/<holder>.json   what a holder has
//	trees/<hex>             mount point of an image
//	(and the mount table of package rootfs/mount)
//
// Locks: the key of an image in Mounts.images, then Mounts.mu.
package mounts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/host/snapshotter"
	"github.com/tatami-containers/tatami/rootfs/keyed"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Config of Mounts.
type Config struct {
	Node    *node.Node
	Mounter *mount.Mounter
	// Dir is the state directory of the Mounter, too.
	Dir string
	// Flow is for whom an image is read that a holder gets now. Nil is nobody in
	// particular.
	Flow func(c snapshotter.Chain) *sched.Flow
	Log  *slog.Logger
}

// Mounts holds images for holders. Its methods may be called concurrently.
type Mounts struct {
	cfg    Config
	log    *slog.Logger
	images keyed.Mutex

	mu      sync.Mutex
	holders map[string]holding // by holder; protected by mu
	files   map[*shared]bool   // open images; protected by mu
}

var _ snapshotter.Images = (*Mounts)(nil)

// New reads who holds what. Call Reopen for the Mounter's Restore, then Collect.
func New(cfg Config) (*Mounts, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Flow == nil {
		cfg.Flow = func(snapshotter.Chain) *sched.Flow { return nil }
	}
	m := &Mounts{cfg: cfg, log: cfg.Log, holders: map[string]holding{}, files: map[*shared]bool{}}
	if err := os.MkdirAll(m.holdersDir(), 0o700); err != nil {
		return nil, fmt.Errorf("make directory of holders: %w", err)
	}
	return m, m.load()
}

// use is a way in which an image is held.
type use string

const (
	tree use = "tree" // mounted
	file use = "file" // exposed as one file
)

// imageOf names a chain as the Mounter knows it: equal names, equal bytes.
func imageOf(c snapshotter.Chain) digest.Digest {
	if c.Whole() {
		return c.Manifest
	}
	return digest.FromString(fmt.Sprintf("%s, lowest %d layers", c.Manifest, c.Layers))
}

// Mount implements snapshotter.Images.
func (m *Mounts) Mount(ctx context.Context, holder string, c snapshotter.Chain) (dir string, err error) {
	image := imageOf(c)
	dir = filepath.Join(m.cfg.Dir, "trees", image.Encoded())
	err = m.hold(ctx, holder, holding{Use: tree, Chain: chain(c)}, func(f *shared) error {
		f.Begin(m.cfg.Flow(c).Class().Fill)
		_, err := m.cfg.Mounter.Mount(ctx, mount.Spec{
			ID: image.Encoded(), Reference: c.Reference, Manifest: image, Image: f, Target: dir, ReadOnly: true,
		})
		return err
	})
	return dir, err
}

// File implements snapshotter.Images.
func (m *Mounts) File(ctx context.Context, holder string, c snapshotter.Chain) (path string, err error) {
	err = m.hold(ctx, holder, holding{Use: file, Chain: chain(c)}, func(f *shared) error {
		f.Begin(m.cfg.Flow(c).Class().Fill)
		path, err = m.cfg.Mounter.Expose(ctx, imageOf(c), c.Reference, f)
		return err
	})
	return path, err
}

// hold writes down that holder has something and sees to it that it is there.
// provide takes the file over.
func (m *Mounts) hold(ctx context.Context, holder string, h holding, provide func(*shared) error) error {
	unlock, err := m.images.Lock(ctx, h.key())
	if err != nil {
		return err
	}
	defer unlock()
	added, err := m.add(holder, h)
	if err != nil {
		return err
	}
	f, err := m.open(ctx, h.chain())
	if errdefs.IsNotFound(err) { // containerd has the image, the node lost it
		if _, err = m.Prepare(ctx, h.Chain.Reference, h.Chain.Manifest); err == nil {
			f, err = m.open(ctx, h.chain())
		}
	}
	if err == nil {
		err = provide(f)
	}
	if err != nil && added {
		err = errors.Join(err, m.drop(holder))
	}
	if err != nil {
		return fmt.Errorf("hold image %s (%s) for %s: %w", h.Chain.Reference, h.Use, holder, err)
	}
	return nil
}

// open opens the image of a chain, or of its lower layers.
func (m *Mounts) open(ctx context.Context, c snapshotter.Chain) (*shared, error) {
	l, err := m.cfg.Node.LeaseManifest(ctx, c.Reference, c.Manifest)
	if err != nil {
		return nil, err
	}
	f := l.File()
	if !c.Whole() {
		if f, err = l.Prefix(ctx, c.Layers); err != nil {
			return nil, err
		}
	}
	return m.share(f, c), nil
}

// Reopen opens images that an earlier process served, for mount.Restore.
func (m *Mounts) Reopen(ctx context.Context) func(mount.Record) (mount.File, error) {
	return func(r mount.Record) (mount.File, error) {
		c, ok := m.chainOf(r.Manifest)
		if !ok {
			return nil, fmt.Errorf("nobody holds image %s (%s): %w", r.Manifest, r.Reference, errdefs.ErrNotFound)
		}
		return m.open(ctx, c)
	}
}

// chainOf finds what an image's name stands for.
func (m *Mounts) chainOf(image digest.Digest) (snapshotter.Chain, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range m.holders {
		if imageOf(h.chain()) == image {
			return h.chain(), true
		}
	}
	return snapshotter.Chain{}, false
}

// Release implements snapshotter.Images.
func (m *Mounts) Release(ctx context.Context, holder string) error {
	m.mu.Lock()
	h, ok := m.holders[holder]
	m.mu.Unlock()
	if !ok {
		return nil
	}
	unlock, err := m.images.Lock(ctx, h.key())
	if err != nil {
		return fmt.Errorf("release %s: %w", holder, err)
	}
	defer unlock()
	if err := m.drop(holder); err != nil {
		return fmt.Errorf("release %s: %w", holder, err)
	}
	if m.held(h) {
		return nil
	}
	if err := m.end(ctx, h.Use, imageOf(h.chain())); err != nil {
		_, adderr := m.add(holder, h) // to be released again: else nobody knows of it
		return fmt.Errorf("release %s: %w", holder, errors.Join(err, adderr))
	}
	return nil
}

// end takes an image away that nobody holds. Precondition: its key is locked.
func (m *Mounts) end(ctx context.Context, u use, image digest.Digest) error {
	var err error
	if u == tree {
		err = m.cfg.Mounter.Unmount(ctx, image.Encoded())
	} else {
		err = m.cfg.Mounter.Conceal(ctx, image)
	}
	if errdefs.IsNotFound(err) { // it went with an earlier session
		return nil
	}
	return err
}

// Collect takes away what nobody holds, as after a crash. It is called before
// the Mounts are used.
func (m *Mounts) Collect(ctx context.Context) error {
	heldTrees, heldFiles := map[digest.Digest]bool{}, map[digest.Digest]bool{}
	m.mu.Lock()
	for _, h := range m.holders {
		if h.Use == tree {
			heldTrees[imageOf(h.chain())] = true
		} else {
			heldFiles[imageOf(h.chain())] = true
		}
	}
	m.mu.Unlock()
	var errs []error
	for _, r := range m.cfg.Mounter.List() {
		if !heldTrees[r.Manifest] {
			errs = append(errs, m.end(ctx, tree, r.Manifest))
		}
	}
	for _, image := range m.cfg.Mounter.Exposed() {
		if !heldFiles[image] {
			errs = append(errs, m.end(ctx, file, image))
		}
	}
	return errors.Join(errs...)
}
