// Package service answers the calls that reach the worker: the Guest service,
// the services that kata-agent expects of a Confidential Data Hub, and, for a
// virtual machine of ours, Runner on behalf of the supervisor.
//
// Lock order: the key of a mount in Guest.ids (held while mounting), Guest.mu,
// starts.mu, then those of the packages below.
package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/guest/images"
	"github.com/tatami-containers/tatami/guest/timing"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/keyed"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/unpack"
)

// pathUnpacked is what MountResponse.path says of an image that was unpacked.
const pathUnpacked = "unpacked"

// Config is what the Guest service works with.
type Config struct {
	Images   *images.Resolver
	Store    *store.Store
	Keep     bool // the store keeps images without mounts
	Mounter  *mount.Mounter
	Unpacked *unpack.Table
	Starts   Recorder // nil: starts are neither recorded nor replayed
	StateDir string   // for what must outlive the process
	Version  string
	Restarts int // of the worker
	Log      *slog.Logger
}

// Guest implements the Guest service.
type Guest struct {
	cfg     Config
	started time.Time
	ids     keyed.Mutex // one Mount or Unmount at a time for each id
	configs configs
	starts  starts

	mu   sync.Mutex
	held map[digest.Digest]int // manifests of calls under way; protected by mu
	busy int                   // calls of mount under way; protected by mu

	pinning sync.Mutex // held from looking at what is mounted until it is pinned

	direct atomic.Int64 // mounts of the node's image files since the start

	background sync.WaitGroup
	ctx        context.Context // of background work; ends with Close
	cancel     context.CancelFunc
}

var _ api.GuestService = (*Guest)(nil)

// New makes the service. Close ends what calls have left running.
func New(cfg Config) *Guest {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	g := &Guest{
		cfg: cfg, started: time.Now(), held: make(map[digest.Digest]int),
		configs: configs{filepath.Join(cfg.StateDir, "configs")},
	}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// Close waits for background work. Mounts stay.
func (g *Guest) Close() {
	g.cancel()
	g.background.Wait()
}

// Mount returns when target is the mounted root file system of the image.
func (g *Guest) Mount(ctx context.Context, req *api.MountRequest) (*api.MountResponse, error) {
	if req.Id == "" || !filepath.IsAbs(req.Target) {
		return nil, fmt.Errorf("mount %q at %q: an id and an absolute target are needed: %w", req.Id, req.Target, errdefs.ErrInvalidArgument)
	}
	phases := timing.Start()
	unlock, err := g.ids.Lock(ctx, req.Id)
	if err != nil {
		return nil, fmt.Errorf("mount %s: wait for another call: %w", req.Id, err)
	}
	defer unlock()
	if _, ok := g.find(req.Id); ok {
		g.sweep(ctx) // a record is no mount: kata-agent unmounts by itself
	}
	if resp, err := g.mounted(req); resp != nil || err != nil {
		return resp, err
	}
	resp, ref, err := g.mount(ctx, req, phases)
	if err != nil {
		g.prune()
		return nil, fmt.Errorf("mount %s: %w", req.Id, err)
	}
	resp.Phases = phases.List()
	g.cfg.Log.Info("mounted", "id", req.Id, "reference", ref, "manifest", resp.ManifestDigest, "path", resp.Path, "source", resp.Source, "phases", phases)
	return resp, nil
}

// mounted answers a call that was made before; nil means that it was not.
func (g *Guest) mounted(req *api.MountRequest) (*api.MountResponse, error) {
	m, ok := g.find(req.Id)
	if !ok {
		return nil, nil
	}
	if m.Target != resolved(req.Target) {
		return nil, fmt.Errorf("mount %s at %s: it is mounted at %s: unmount it first: %w", req.Id, req.Target, m.Target, errdefs.ErrAlreadyExists)
	}
	if req.Reference != "" && req.Reference != m.Reference && !sameImage(req.Reference, m.Reference) {
		return nil, fmt.Errorf("mount %s: it is a mount of %s: unmount it first: %w", req.Id, m.Reference, errdefs.ErrAlreadyExists)
	}
	config, err := g.configs.get(digest.Digest(m.ManifestDigest))
	if err != nil {
		return nil, fmt.Errorf("mount %s again: %w", req.Id, err)
	}
	return &api.MountResponse{ManifestDigest: m.ManifestDigest, Config: config, Path: m.Path, Source: m.Source}, nil
}

// resolved is a target without symbolic links, as far as it exists. Its last
// element is not looked at: it may be a mount that only we can answer for.
func resolved(target string) string {
	dir, err := filepath.EvalSymlinks(filepath.Dir(target))
	if err != nil {
		return filepath.Clean(target)
	}
	return filepath.Join(dir, filepath.Base(target))
}

func (g *Guest) mount(ctx context.Context, req *api.MountRequest, phases *timing.Phases) (*api.MountResponse, string, error) {
	defer g.enter()()
	img, err := g.cfg.Images.Resolve(ctx, req.Id, req.Reference, req.Mode == api.Mode_MODE_FULL, phases)
	if err != nil {
		return nil, "", err
	}
	release, err := g.hold(img)
	if err != nil {
		return nil, "", err
	}
	defer release()
	made, err := g.mountImage(ctx, req, img, phases)
	if err != nil {
		return nil, "", err
	}
	return &api.MountResponse{ManifestDigest: img.Manifest.String(), Config: img.Config, Path: made.path, Source: made.source}, img.Reference, nil
}

// way is how an image is mounted and where its bytes come from.
type way struct{ path, source string }

// mountImage mounts the best way that works.
func (g *Guest) mountImage(ctx context.Context, req *api.MountRequest, img *images.Image, phases *timing.Phases) (way, error) {
	if img.Local != "" {
		made, err := g.mountLocal(ctx, req, img, phases)
		if err == nil || ctx.Err() != nil || errdefs.IsAlreadyExists(err) {
			return made, err
		}
		g.cfg.Log.Warn("the node's image file cannot be mounted: the image comes over the relay",
			"id", req.Id, "reference", img.Reference, "file", img.Local, "error", err)
		g.cfg.Images.ReadIndex(ctx, img, phases)
	}
	if img.Index != nil {
		return g.mountLazy(ctx, req, img, phases)
	}
	return g.mountUnpacked(ctx, req, img, phases)
}

// localTimeout bounds the mount of the node's image file, for which the node
// needs nothing but what it has.
const localTimeout = 15 * time.Second

// mountLocal mounts the node's image file as it is.
func (g *Guest) mountLocal(ctx context.Context, req *api.MountRequest, img *images.Image, phases *timing.Phases) (way, error) {
	defer phases.Begin("mount")()
	ctx, cancel := context.WithTimeoutCause(ctx, localTimeout,
		fmt.Errorf("virtio-fs does not answer within %v: %w", localTimeout, errdefs.ErrUnavailable))
	defer cancel()
	spec := mountSpec(req, img)
	spec.Local = img.Local
	rec, err := g.cfg.Mounter.Mount(ctx, spec)
	if err == nil && rec.Local != "" {
		g.direct.Add(1)
	}
	return way{string(rec.Path), rec.Source}, err
}

func mountSpec(req *api.MountRequest, img *images.Image) mount.Spec {
	return mount.Spec{
		ID: req.Id, Reference: img.Reference, Manifest: img.Manifest, Source: img.Source,
		Target: req.Target, Upper: req.Upper, ReadOnly: req.ReadOnly,
	}
}

func (g *Guest) mountLazy(ctx context.Context, req *api.MountRequest, img *images.Image, phases *timing.Phases) (way, error) {
	end := phases.Begin("open")
	sources, err := g.cfg.Images.Sources(img.Reference, img.Manifest, img.Index.Size())
	if err != nil {
		return way{}, err
	}
	file, err := g.cfg.Store.OpenImage(ctx, img.Index, sources)
	if err != nil {
		return way{}, err
	}
	end()
	img.Index = nil // the store has what it needs; the bootstrap may be large
	defer phases.Begin("mount")()
	spec := mountSpec(req, img)
	spec.Image = file
	begin := g.expect(req.Id, img, file)
	rec, err := g.cfg.Mounter.Mount(ctx, spec)
	if err == nil {
		begin()
	}
	return way{string(rec.Path), rec.Source}, err
}

func (g *Guest) mountUnpacked(ctx context.Context, req *api.MountRequest, img *images.Image, phases *timing.Phases) (way, error) {
	if img.Reason != nil {
		g.cfg.Log.Warn("no lazy mount: unpacking the whole image", "id", req.Id, "reference", img.Reference, "error", img.Reason)
	}
	defer phases.Begin("unpack")()
	rec, err := g.cfg.Unpacked.Mount(ctx, unpack.Spec{
		ID: req.Id, Reference: img.Reference, Source: img.Source, Manifest: img.Manifest, Layers: img.Layers, DiffIDs: img.DiffIDs, Blobs: img.Blobs(),
		Target: resolved(req.Target), Upper: req.Upper, ReadOnly: req.ReadOnly,
	})
	return way{pathUnpacked, rec.Source}, err
}

// Unmount undoes Mount.
func (g *Guest) Unmount(ctx context.Context, req *api.UnmountRequest) (*api.UnmountResponse, error) {
	unlock, err := g.ids.Lock(ctx, req.Id)
	if err != nil {
		return nil, fmt.Errorf("unmount %s: wait for another call: %w", req.Id, err)
	}
	defer unlock()
	g.starts.end(req.Id)
	if _, ok := g.cfg.Unpacked.Get(req.Id); ok {
		err = g.cfg.Unpacked.Unmount(ctx, req.Id)
	} else {
		err = g.cfg.Mounter.Unmount(ctx, req.Id)
	}
	if err != nil {
		return nil, err
	}
	g.prune()
	g.cfg.Log.Info("unmounted", "id", req.Id)
	return &api.UnmountResponse{}, nil
}

// Prefetch asks for bytes that will be read; it does not wait for them.
func (g *Guest) Prefetch(ctx context.Context, req *api.PrefetchRequest) (*api.PrefetchResponse, error) {
	m, ok := g.find(req.Id)
	if !ok {
		return nil, fmt.Errorf("prefetch %s: no such mount: %w", req.Id, errdefs.ErrNotFound)
	}
	if m.Path == pathUnpacked || g.isDirect(m) {
		return &api.PrefetchResponse{}, nil
	}
	img, err := g.open(ctx, m.Reference, digest.Digest(m.ManifestDigest), m.ImageSize)
	if err != nil {
		return nil, fmt.Errorf("prefetch %s: %w", req.Id, err)
	}
	ranges, err := clip(req.Ranges, img.Size())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prefetch %s: %w", req.Id, err), img.Close())
	}
	g.background.Go(func() {
		defer func() { _ = img.Close() }() // nothing was written
		if err := g.prefetch(img, ranges); err != nil {
			g.cfg.Log.Warn("prefetch", "id", req.Id, "error", err)
		}
	})
	return &api.PrefetchResponse{}, nil
}

// prefetch fetches ranges. The whole image is filled in the background of
// demand reads, where it can be kept.
func (g *Guest) prefetch(img *store.Image, ranges []*api.Range) error {
	if g.cfg.Keep && len(ranges) == 1 && ranges[0].Length == img.Size() {
		return img.Fill(g.ctx)
	}
	for _, r := range ranges {
		if err := img.Prefetch(g.ctx, r.Offset, r.Length); err != nil {
			return err
		}
	}
	return nil
}

// clip checks ranges against the size of the image.
func clip(ranges []*api.Range, size int64) ([]*api.Range, error) {
	if len(ranges) == 0 {
		return []*api.Range{{Length: size}}, nil
	}
	for _, r := range ranges {
		if r.Offset < 0 || r.Length < 0 || r.Offset > size || r.Length > size-r.Offset {
			return nil, fmt.Errorf("range %d+%d is not within the image of %d bytes: %w", r.Offset, r.Length, size, errdefs.ErrInvalidArgument)
		}
	}
	return ranges, nil
}

// open returns a handle of an image that is mounted.
func (g *Guest) open(ctx context.Context, ref string, manifest digest.Digest, size int64) (*store.Image, error) {
	sources, err := g.cfg.Images.Sources(ref, manifest, size)
	if err != nil {
		return nil, err
	}
	return g.cfg.Store.LoadImage(ctx, manifest, sources)
}

// Reopen returns the image of a record that an earlier process mounted.
func (g *Guest) Reopen(ctx context.Context) func(mount.Record) (mount.File, error) {
	return func(r mount.Record) (mount.File, error) {
		img, err := g.open(ctx, r.Reference, r.Manifest, r.Size)
		if err != nil {
			return nil, err
		}
		return img, nil
	}
}
