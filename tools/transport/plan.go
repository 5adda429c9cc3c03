package transport

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// Bounds of what is copied in one go; real images stay far below.
const (
	maxDepth         = 4 // of indexes in indexes
	maxManifests     = 16 << 10
	maxManifestBytes = 256 << 20 // of all manifests, which are held in memory
	maxBlobs         = 256 << 10
)

// plan is what is to be copied, each once. It belongs to one goroutine.
type plan struct {
	src       Source
	manifests []manifest // what an index names comes before it
	blobs     []ocispec.Descriptor
	seen      map[digest.Digest]bool // manifests and blobs
	bytes     int64                  // of manifests
}

type manifest struct {
	desc   ocispec.Descriptor
	data   []byte
	refers bool // it has a subject
}

func newPlan(src Source) *plan { return &plan{src: src, seen: map[digest.Digest]bool{}} }

// add plans a manifest or index with all below it.
func (p *plan) add(ctx context.Context, desc ocispec.Descriptor, data []byte, depth int) error {
	if p.seen[desc.Digest] {
		return nil
	}
	p.seen[desc.Digest] = true
	p.bytes += int64(len(data))
	if depth > maxDepth || p.bytes > maxManifestBytes || len(p.manifests) >= maxManifests {
		return fmt.Errorf("manifest %s: more than %d levels, %d manifests or %d bytes of them: %w", desc.Digest, maxDepth, maxManifests, maxManifestBytes, errdefs.ErrInvalidArgument)
	}
	var doc struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
	}
	if !isManifest(desc.MediaType) {
		return fmt.Errorf("manifest %s is of media type %.100q, which cannot be copied: %w", desc.Digest, desc.MediaType, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return fmt.Errorf("decode manifest %s: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if doc.Config != nil {
		doc.Layers = append(doc.Layers, *doc.Config)
	}
	for _, d := range doc.Manifests {
		if err := p.addChild(ctx, d, depth); err != nil {
			return err
		}
	}
	for _, d := range doc.Layers {
		if err := p.addBlob(d); err != nil {
			return fmt.Errorf("manifest %s: %w", desc.Digest, err)
		}
	}
	subject, _ := registry.Referrer(desc, data)
	p.manifests = append(p.manifests, manifest{desc, data, subject != ""})
	return nil
}

// addChild plans what an index names, which need not be a manifest.
func (p *plan) addChild(ctx context.Context, desc ocispec.Descriptor, depth int) error {
	if !isManifest(desc.MediaType) {
		return p.addBlob(desc)
	}
	if p.seen[desc.Digest] {
		return nil
	}
	data, err := p.src.Manifest(ctx, desc)
	if err != nil {
		return err
	}
	return p.add(ctx, desc, data, depth+1)
}

func (p *plan) addBlob(desc ocispec.Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.100q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if desc.Size < 0 || len(p.blobs) >= maxBlobs {
		return fmt.Errorf("blob %s of %d bytes, after %d others: %w", desc.Digest, desc.Size, len(p.blobs), errdefs.ErrInvalidArgument)
	}
	if isForeign(desc) || p.seen[desc.Digest] {
		return nil
	}
	p.seen[desc.Digest] = true
	p.blobs = append(p.blobs, desc)
	return nil
}

// addReferrers plans what refers to the planned manifests, and to those.
func (p *plan) addReferrers(ctx context.Context) error {
	for i := 0; i < len(p.manifests); i++ {
		subject := p.manifests[i].desc.Digest
		list, err := p.src.Referrers(ctx, subject, "")
		if err != nil {
			return err
		}
		for _, d := range list {
			if p.seen[d.Digest] {
				continue
			}
			data, err := p.src.Manifest(ctx, d)
			if err != nil {
				return fmt.Errorf("referrer of %s: %w", subject, err)
			}
			if err := p.add(ctx, d, data, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

func isManifest(mediaType string) bool {
	switch mediaType {
	case ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, registry.DockerManifestList, registry.DockerManifest:
		return true
	}
	return false
}

// isForeign tells layers that are kept elsewhere, as those of Windows: their
// registry may not have them, and must not be given them.
func isForeign(desc ocispec.Descriptor) bool {
	switch desc.MediaType {
	case "application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
		"application/vnd.docker.image.rootfs.foreign.diff.tar",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		return len(desc.URLs) > 0
	}
	return false
}
