package formats

import (
	"context"
	"io"
	"sync/atomic"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// maxReferrers bounds how many artifacts of one kind are read for an image.
const maxReferrers = 4

// Discover looks for what was published with the image and, with beside, for
// what was published beside it (its referrers). What cannot be read is logged
// and passed over: there are other ways. It must not be called twice.
func (f *Finder) Discover(ctx context.Context, beside bool) {
	if desc, ok := artifact.Bound(f.image.Parent, f.image.Desc.Digest); ok {
		f.take(ctx, desc, true)
	}
	if !beside {
		return
	}
	refs, err := f.repo.Referrers(ctx, f.image.Desc.Digest, "")
	if err != nil {
		f.log.Warn("the registry does not tell what refers to the image", "manifest", f.image.Desc.Digest, "error", err)
	}
	f.takeReferrers(ctx, refs)
}

func (f *Finder) takeReferrers(ctx context.Context, refs []ocispec.Descriptor) {
	n := 0
	for _, desc := range refs {
		if desc.ArtifactType != index.ArtifactType || n == maxReferrers {
			continue
		}
		n++
		f.take(ctx, desc, false)
	}
}

// take reads an index artifact.
func (f *Finder) take(ctx context.Context, desc ocispec.Descriptor, bound bool) {
	data, err := f.repo.Manifest(ctx, desc)
	f.Fetched += int64(len(data))
	var files *artifact.Files
	if err == nil {
		files, err = artifact.Decode(data, f.image.Desc.Digest)
	}
	if err != nil {
		f.log.Warn("an index of the image cannot be used", "manifest", f.image.Desc.Digest, "index", desc.Digest, "error", err)
		return
	}
	f.Artifacts = append(f.Artifacts, Artifact{desc, data, files, bound})
}

// counted counts what is asked of a blob.
type counted struct {
	layer.Blob
	bytes atomic.Int64
}

func count(b layer.Blob) *counted { return &counted{Blob: b} }

func (c *counted) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	c.bytes.Add(n)
	return c.Blob.ReadRange(ctx, off, n)
}
