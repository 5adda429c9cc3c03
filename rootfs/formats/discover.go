package formats

import (
	"context"
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/soci"
)

// maxReferrers bounds how many artifacts of one kind are read for an image.
const maxReferrers = 4

// Discover looks for what was published with the image and, with beside, for
// what was published beside it (its referrers). What cannot be read is logged
// and passed over: there are other ways. It must not be called twice.
func (f *Finder) Discover(ctx context.Context, beside bool) {
	bound, ok := artifact.Bound(f.image.Parent, f.image.Desc.Digest)
	if ok {
		f.take(ctx, bound, true)
	}
	if beside {
		f.referrers(ctx, bound.Digest)
	}
	f.findZtocs(ctx, beside)
}

// referrers reads the index artifacts that the registry lists for the image,
// but for the bound one, which is usually listed too.
func (f *Finder) referrers(ctx context.Context, bound digest.Digest) {
	refs, err := f.repo.Referrers(ctx, f.image.Desc.Digest, index.ArtifactType)
	if err != nil {
		f.log.Warn("the registry does not tell what refers to the image", "manifest", f.image.Desc.Digest, "error", err)
	}
	refs = slices.DeleteFunc(refs, func(d ocispec.Descriptor) bool { return d.Digest == bound })
	for _, desc := range refs[:min(len(refs), maxReferrers)] {
		f.take(ctx, desc, false)
	}
}

// findZtocs looks for indexes of SOCI, if there is a layer that needs one.
func (f *Finder) findZtocs(ctx context.Context, beside bool) {
	layers, err := f.Layers()
	if err != nil || !slices.ContainsFunc(layers, func(l Layer) bool { return len(f.Ways(l)) == 0 }) {
		return
	}
	var repo soci.Registry = f.repo
	if !beside {
		repo = withoutReferrers{f.repo}
	}
	f.ztocs, err = soci.Find(ctx, repo, soci.Image{
		Digest: f.image.Desc.Digest, Manifest: f.image.ManifestBytes, Index: f.image.Parent,
	})
	if err != nil {
		f.log.Warn("an index of SOCI cannot be used", "manifest", f.image.Desc.Digest, "error", err)
	}
}

// withoutReferrers is a repository where nothing refers to anything.
type withoutReferrers struct{ Repository }

func (withoutReferrers) Referrers(context.Context, digest.Digest, string) ([]ocispec.Descriptor, error) {
	return nil, nil
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

func (c *counted) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	c.bytes.Add(n)
	return c.Blob.ReadRange(ctx, off, n)
}

// counters count what is asked of several blobs.
type counters struct {
	mu  sync.Mutex
	all []*counted // protected by mu
}

func (c *counters) count(b layer.Blob) layer.Blob {
	one := &counted{Blob: b}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, one)
	return one
}

func (c *counters) total() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	sum := int64(0)
	for _, one := range c.all {
		sum += one.bytes.Load()
	}
	return sum
}
