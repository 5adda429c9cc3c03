package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry is what an image is resolved from: a *registry.Repository. Digests
// and sizes of what it returns are checked by it.
type Registry interface {
	// GetManifest reads the manifest or index that a tag or digest means.
	GetManifest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error)
	// Manifest reads the manifest or index that desc names.
	Manifest(ctx context.Context, desc ocispec.Descriptor) ([]byte, error)
	// Blob reads a small blob.
	Blob(ctx context.Context, desc ocispec.Descriptor) ([]byte, error)
}

// Image is one image for one platform.
type Image struct {
	Reference     string             // normalised, as it was asked for
	Desc          ocispec.Descriptor // of the manifest, not of an index above it
	Manifest      ocispec.Manifest
	ManifestBytes []byte
	Config        ocispec.Image
	ConfigBytes   []byte
	// Parent is the index that the manifest was chosen from, nil if the reference
	// means the manifest itself. What is listed in it is bound by its digest.
	Parent      *ocispec.Index
	ParentDesc  ocispec.Descriptor
	ParentBytes []byte
	Layers      []Layer // lowest first; one blob may appear more than once
}

// Layer is one layer as manifest and config describe it.
type Layer struct {
	ocispec.Descriptor
	DiffID digest.Digest
}

// CheckDiffID compares what a layer unpacked to with what the image's config
// says. It is of class ErrDataLoss when they differ. Other algorithms than that
// of the config cannot be compared and count as equal. Each image has to be
// compared by itself: of two that share a layer one may be forged.
func (l Layer) CheckDiffID(got digest.Digest) error {
	if got == l.DiffID || got.Algorithm() != l.DiffID.Algorithm() {
		return nil
	}
	return fmt.Errorf("layer %s unpacks to diffID %s, the image's config says %s: the image is damaged or forged, build it again: %w",
		l.Digest, got, l.DiffID, errdefs.ErrDataLoss)
}

// Resolve reads the image that ref means, for the platform that fits best (see
// DefaultPlatform); the zero platform takes a single image as it is. An index inside an index is followed once. The repository
// of ref is not looked at: reg is asked for its tag or digest.
func Resolve(ctx context.Context, reg Registry, ref reference.Named, platform ocispec.Platform) (*Image, error) {
	return ResolveObject(ctx, reg, Object(ref), ref.String(), platform)
}

// ResolveObject is Resolve for images that have no reference: object is what
// GetManifest is asked for, name what errors and Image.Reference call it.
func ResolveObject(ctx context.Context, reg Registry, object, name string, platform ocispec.Platform) (*Image, error) {
	img, err := resolve(ctx, reg, object, platform)
	if err != nil {
		return nil, fmt.Errorf("resolve image %s: %w", name, err)
	}
	img.Reference = name
	return img, nil
}

func resolve(ctx context.Context, reg Registry, object string, platform ocispec.Platform) (*Image, error) {
	desc, data, err := reg.GetManifest(ctx, object)
	if err != nil {
		return nil, err
	}
	img := new(Image)
	doc, err := decode(data, desc.MediaType)
	for depth := 0; err == nil && doc.index != nil; depth++ {
		if depth == 2 {
			return nil, invalid("an index inside an index inside an index")
		}
		img.Parent, img.ParentDesc, img.ParentBytes = doc.index, desc, data
		if desc, data, err = follow(ctx, reg, doc.index, platform); err != nil {
			return nil, err
		}
		doc, err = decode(data, desc.MediaType)
	}
	if err != nil {
		return nil, err
	}
	img.Desc, img.Manifest, img.ManifestBytes = desc, *doc.manifest, data
	return img, img.readConfig(ctx, reg, platform)
}

// follow reads the manifest that index has for platform.
func follow(ctx context.Context, reg Registry, index *ocispec.Index, platform ocispec.Platform) (ocispec.Descriptor, []byte, error) {
	desc, err := choose(index.Manifests, platform)
	if err != nil {
		return desc, nil, err
	}
	data, err := reg.Manifest(ctx, desc)
	return desc, data, err
}

func (img *Image) readConfig(ctx context.Context, reg Registry, want ocispec.Platform) error {
	data, err := reg.Blob(ctx, img.Manifest.Config)
	if err != nil {
		return err
	}
	config, ids, err := decodeConfig(data, len(img.Manifest.Layers))
	if err != nil {
		return err
	}
	if want.Architecture != "" && config.Architecture != "" && rank(config.Platform, want) == 0 {
		return fmt.Errorf("no image for platform %s; available: %s: %w", format(want), format(config.Platform), errdefs.ErrNotFound)
	}
	img.Config, img.ConfigBytes = config, data
	img.Layers = make([]Layer, len(ids))
	for i, d := range img.Manifest.Layers {
		img.Layers[i] = Layer{Descriptor: d, DiffID: ids[i]}
	}
	return nil
}
