package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/guest/timing"
	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// maxReferrers bounds how many indexes of one image are tried.
const maxReferrers = 4

// fromNode reads manifest, configuration and index over the relay; the index
// does not wait for the manifest, and is not read when the node shows the image
// itself.
func (r *Resolver) fromNode(ctx context.Context, p pin, whole bool, phases *timing.Phases) (*Image, error) {
	defer phases.Begin("exchange")()
	repo := r.cfg.Relay.Mirror(relayHost, p.name)
	var img *Image
	var idx *index.Image
	var file string
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		img, err = readImage(gctx, repo, p)
		return err
	})
	lazy := !whole && p.trust == TrustHost
	var reason error
	g.Go(func() error {
		if lazy || !whole && r.verifiesShared() {
			file = r.sharedFile(gctx, p, phases)
		}
		if lazy && file == "" {
			defer phases.Begin("index")()
			// Without one the image can still be unpacked.
			idx, reason = readIndex(gctx, repo, p.manifest)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	img.Index, img.Reason, img.Source, img.Start = idx, reason, SourceRelay, p.start
	if file != "" {
		img.Source = SourceVirtioFS
	}
	switch {
	case lazy:
		img.Local = file
	case !whole:
		img.Index, img.Reason = r.indexFromImage(ctx, img, phases)
	}
	return img, ctx.Err()
}

// sharedFile looks for the node's image file; "" if it cannot be had.
func (r *Resolver) sharedFile(ctx context.Context, p pin, phases *timing.Phases) string {
	if len(r.cfg.Shared) == 0 {
		return ""
	}
	defer phases.Begin(SourceVirtioFS)()
	file, err := r.shared.find(ctx, p.manifest)
	switch {
	case err == nil:
		return file
	case errors.Is(err, errNoShare):
		r.cfg.Log.Debug("image comes over the relay", "reference", p.name.String(), "error", err)
	default:
		r.cfg.Log.Warn("image comes over the relay", "reference", p.name.String(), "error", err)
	}
	return ""
}

// ReadIndex reads the index of an image whose file turned out to be no use.
func (r *Resolver) ReadIndex(ctx context.Context, img *Image, phases *timing.Phases) {
	defer phases.Begin("index")()
	img.Local, img.Source = "", SourceRelay
	img.Index, img.Reason = readIndex(ctx, img.blobs, img.Manifest)
}

// fromRegistry resolves a reference without the node.
func (r *Resolver) fromRegistry(ctx context.Context, ref string, whole bool, phases *timing.Phases) (*Image, error) {
	if r.cfg.Registry == nil {
		return nil, fmt.Errorf("read %s: the guest may not ask registries; set registry = true: %w", ref, errdefs.ErrFailedPrecondition)
	}
	name, err := image.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	end := phases.Begin("resolve")
	img, err := readImage(ctx, r.cfg.Registry.Repository(name), pin{name: name})
	end()
	if err != nil {
		return nil, err
	}
	img.Source = SourceRegistry
	if whole {
		return img, nil
	}
	img.Index, img.Reason = r.indexFromImage(ctx, img, phases)
	return img, ctx.Err()
}

// readImage reads manifest and configuration, pinned or by the name's tag. What
// is pinned is taken whatever its platform is.
func readImage(ctx context.Context, repo *registry.Repository, p pin) (*Image, error) {
	ref, platform := p.name, image.DefaultPlatform()
	if p.manifest != "" {
		var err error
		if ref, err = reference.WithDigest(reference.TrimNamed(p.name), p.manifest); err != nil {
			return nil, fmt.Errorf("pin %s to %s: %w: %w", p.name, p.manifest, err, errdefs.ErrInvalidArgument)
		}
		platform = ocispec.Platform{}
	}
	found, err := image.Resolve(ctx, repo, ref, platform)
	if err != nil {
		return nil, err
	}
	if p.manifest != "" && found.Desc.Digest != p.manifest {
		return nil, fmt.Errorf("%s is an index of images, not the manifest of one: %w", p.manifest, errdefs.ErrInvalidArgument)
	}
	if p.asked != "" && p.asked != p.manifest {
		if err := readParent(ctx, repo, p, found); err != nil {
			return nil, err
		}
	}
	img := &Image{Reference: p.name.String(), Manifest: found.Desc.Digest, Config: found.ConfigBytes, found: found, blobs: repo}
	for _, l := range found.Layers {
		img.Layers = append(img.Layers, l.Descriptor)
		img.DiffIDs = append(img.DiffIDs, l.DiffID)
	}
	return img, nil
}

// readParent reads the image index that the guest was asked for. What the node
// has pinned must be in it.
func readParent(ctx context.Context, repo *registry.Repository, p pin, img *image.Image) error {
	data, err := repo.Manifest(ctx, ocispec.Descriptor{Digest: p.asked})
	if err != nil {
		return fmt.Errorf("check that %s is the image of %s: %w", p.manifest, p.asked, err)
	}
	var list ocispec.Index
	if err := json.Unmarshal(data, &list); err != nil {
		return fmt.Errorf("decode index of images %s: %w: %w", p.asked, err, errdefs.ErrInvalidArgument)
	}
	listed := func(d ocispec.Descriptor) bool { return d.Digest == p.manifest }
	if !slices.ContainsFunc(list.Manifests, listed) {
		return fmt.Errorf("the node gives manifest %s for %s, which names others: %w", p.manifest, p.asked, errPolicy)
	}
	img.Parent = &list
	return nil
}

// readIndex reads the index of an image from among its referrers. What is no
// valid index of this very manifest is passed over.
func readIndex(ctx context.Context, repo *registry.Repository, manifest digest.Digest) (*index.Image, error) {
	refs, err := repo.Referrers(ctx, manifest, index.ArtifactType)
	if err != nil {
		return nil, fmt.Errorf("list indexes of %s: %w", manifest, err)
	}
	if len(refs) == 0 {
		return nil, fmt.Errorf("the relay has no index of %s: %w", manifest, errdefs.ErrNotFound)
	}
	var errs []error
	for _, desc := range refs[:min(len(refs), maxReferrers)] {
		idx, err := readArtifact(ctx, repo, desc, manifest)
		if err == nil {
			return idx, nil
		}
		errs = append(errs, fmt.Errorf("index %s: %w", desc.Digest, err))
	}
	return nil, errors.Join(errs...)
}

func readArtifact(ctx context.Context, repo *registry.Repository, desc ocispec.Descriptor, manifest digest.Digest) (*index.Image, error) {
	b, err := repo.Manifest(ctx, desc)
	if err != nil {
		return nil, err
	}
	files, err := artifact.Decode(b, manifest)
	if err != nil {
		return nil, err
	}
	if files.Image == nil {
		return nil, fmt.Errorf("the artifact has no index of the whole image: %w", errdefs.ErrNotFound)
	}
	if b, err = repo.Blob(ctx, *files.Image); err != nil {
		return nil, err
	}
	idx, err := index.DecodeImage(b)
	if err != nil {
		return nil, err
	}
	if idx.Manifest != manifest {
		return nil, fmt.Errorf("it is for manifest %s: %w", idx.Manifest, errdefs.ErrDataLoss)
	}
	return idx, nil
}
