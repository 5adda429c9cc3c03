package transport

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// Selection is what a source's name means: one image, or an index of several.
type Selection struct {
	Desc   ocispec.Descriptor // of the manifest or index that the name means
	Index  *ocispec.Index     // nil for a single image
	Images []*image.Image     // in the order of the index, each with its Parent and the platform in its Desc
}

// Select reads the images that the source's name means: all of an index, or the
// one for platform. name is what errors and the images call it.
func Select(ctx context.Context, src Source, name string, platform *ocispec.Platform) (*Selection, error) {
	desc, data, err := src.GetManifest(ctx, "")
	if err != nil {
		return nil, err
	}
	sel := &Selection{Desc: desc}
	if desc.MediaType != ocispec.MediaTypeImageIndex && desc.MediaType != registry.DockerManifestList {
		img, err := resolveOne(ctx, src, name, platform)
		sel.Images = []*image.Image{img}
		return sel, err
	}
	sel.Index = new(ocispec.Index)
	if err := json.Unmarshal(data, sel.Index); err != nil {
		return nil, fmt.Errorf("decode the index of %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if platform != nil {
		img, err := resolveOne(ctx, src, name, platform)
		sel.Images = []*image.Image{img}
		return sel, err
	}
	for _, d := range sel.Index.Manifests {
		if !isImage(d) {
			continue
		}
		// The zero platform: a config may say less than the index, as "arm" for
		// arm/v6.
		img, err := image.ResolveObject(ctx, src, d.Digest.String(), name, ocispec.Platform{})
		if err != nil {
			return nil, err
		}
		img.Desc.Platform = d.Platform
		img.Parent, img.ParentDesc, img.ParentBytes = sel.Index, desc, data
		sel.Images = append(sel.Images, img)
	}
	if len(sel.Images) == 0 {
		return nil, fmt.Errorf("%s lists no image with a platform: %w", name, errdefs.ErrNotFound)
	}
	return sel, nil
}

// PlatformOf is what an image runs on: what the index that it was chosen from
// says, as configs often leave out the variant; else what its config says.
func PlatformOf(img *image.Image) ocispec.Platform {
	if p := img.Desc.Platform; p != nil && p.Architecture != "" {
		return *p
	}
	return img.Config.Platform
}

func resolveOne(ctx context.Context, src Source, name string, platform *ocispec.Platform) (*image.Image, error) {
	if platform == nil {
		return image.ResolveObject(ctx, src, "", name, ocispec.Platform{})
	}
	return image.ResolveObject(ctx, src, "", name, *platform)
}

// isImage leaves out what is no image for a platform: attestations, artifacts,
// indexes inside the index.
func isImage(d ocispec.Descriptor) bool {
	manifest := d.MediaType == ocispec.MediaTypeImageManifest || d.MediaType == registry.DockerManifest
	return manifest && d.ArtifactType == "" && d.Platform != nil && d.Platform.OS != "unknown"
}
