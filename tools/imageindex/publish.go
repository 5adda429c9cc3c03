package imageindex

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/tools/transport"
)

// Publish writes the artifact of an image beside it, where it is found as a
// referrer.
func Publish(ctx context.Context, dst transport.Dest, img *image.Image, files []File) (ocispec.Descriptor, error) {
	descs := make([]ocispec.Descriptor, len(files))
	for i, f := range files {
		descs[i] = f.Desc
		if err := push(ctx, dst, f.Desc, f.Data); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	if err := push(ctx, dst, ocispec.DescriptorEmptyJSON, ocispec.DescriptorEmptyJSON.Data); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, data, err := artifact.New(img.Desc, descs...)
	if err != nil {
		return desc, err
	}
	if _, err := dst.PushManifest(ctx, desc.MediaType, data, ""); err != nil {
		return desc, fmt.Errorf("push the index of %s: %w", img.Reference, err)
	}
	return desc, nil
}

func push(ctx context.Context, dst transport.Dest, desc ocispec.Descriptor, data []byte) error {
	has, err := dst.Has(ctx, desc)
	if err == nil && !has {
		err = dst.PushBlob(ctx, desc, bytes.NewReader(data))
	}
	if err != nil {
		return fmt.Errorf("push %s: %w", desc.Digest, err)
	}
	return nil
}

// Bound is an image and the descriptor of its artifact.
type Bound struct {
	Image    *image.Image
	Artifact ocispec.Descriptor
}

// Bind returns an image index that has all of parent, or of a new index if that
// is nil, and binds artifacts to its images. Artifacts that were bound to them
// before are left out. The result is an OCI index, as Docker's lists have no
// artifacts; the manifests in it stay what they are.
func Bind(parent *ocispec.Index, all []Bound) ([]byte, error) {
	var out ocispec.Index
	if parent != nil {
		out = *parent
		out.Manifests = slices.DeleteFunc(slices.Clone(parent.Manifests), func(d ocispec.Descriptor) bool { return replaced(d, all) })
	}
	out.SchemaVersion, out.MediaType = 2, ocispec.MediaTypeImageIndex
	for _, b := range all {
		if parent == nil {
			out.Manifests = append(out.Manifests, withPlatform(b.Image))
		}
		out.Manifests = append(out.Manifests, artifact.Bind(b.Artifact, b.Image.Desc.Digest))
	}
	data, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("encode image index: %w", err)
	}
	return data, nil
}

// replaced says whether d is an artifact of one of the images.
func replaced(d ocispec.Descriptor, all []Bound) bool {
	return d.ArtifactType == index.ArtifactType && slices.ContainsFunc(all, func(b Bound) bool {
		return d.Annotations[artifact.AnnotationImage] == b.Image.Desc.Digest.String()
	})
}

// withPlatform describes an image as an index does.
func withPlatform(img *image.Image) ocispec.Descriptor {
	platform := transport.PlatformOf(img)
	return ocispec.Descriptor{MediaType: img.Desc.MediaType, Digest: img.Desc.Digest, Size: img.Desc.Size, Platform: &platform}
}
