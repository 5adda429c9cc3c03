package formats

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/estargz"
	"github.com/tatami-containers/tatami/rootfs/layer/nydus"
	"github.com/tatami-containers/tatami/rootfs/layer/soci"
	"github.com/tatami-containers/tatami/rootfs/layer/zstdchunked"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// tocWay takes the index from a layer's table of contents, if the manifest
// binds one.
func (f *Finder) tocWay(l Layer) (Way, bool) {
	if strings.HasSuffix(l.MediaType, "zstd") {
		toc, ok := zstdchunked.TOC(l.Annotations)
		return f.rangedWay(FromTOC, toc, func(ctx context.Context, blobs blobs, _ *sched.Worker) (*index.Layer, error) {
			return zstdchunked.Open(ctx, blobs(l.Descriptor), l.Descriptor)
		}), ok
	}
	toc, ok := estargz.TOC(l.Annotations)
	return f.rangedWay(FromTOC, toc, func(ctx context.Context, blobs blobs, worker *sched.Worker) (*index.Layer, error) {
		made, err := estargz.Open(ctx, blobs(l.Descriptor), l.Descriptor, toc)
		if errdefs.IsNotFound(err) {
			return f.openExternal(ctx, blobs, worker, l, toc, err)
		}
		return made, err
	}), ok
}

// nydusWay takes the index of the whole image from its bootstrap.
func (f *Finder) nydusWay(l Layer) Way {
	return f.rangedWay(FromNydus, l.Digest, func(ctx context.Context, blobs blobs, _ *sched.Worker) (*index.Layer, error) {
		return nydus.Open(ctx, f.descriptors(), blobs)
	})
}

// blobs finds a blob of the image's repository.
type blobs = func(layer.Descriptor) layer.Blob

// rangedWay is one that reads ranges of blobs. What by names is bound.
func (f *Finder) rangedWay(from string, by digest.Digest, open func(context.Context, blobs, *sched.Worker) (*index.Layer, error)) Way {
	return Way{From: from, By: by, Bound: true, Lazy: true, Open: func(ctx context.Context) (*index.Layer, int64, error) {
		var read counters
		made, err := f.compute(ctx, func(worker *sched.Worker) (*index.Layer, error) {
			return open(ctx, func(d layer.Descriptor) layer.Blob { return layer.Waiting(read.count(f.blob(d)), worker) }, worker)
		})
		return made, read.total(), err
	}}
}

// compute calls open with a worker that has a turn.
func (f *Finder) compute(ctx context.Context, open func(*sched.Worker) (*index.Layer, error)) (*index.Layer, error) {
	worker := f.CPU.Worker(ctx)
	if err := worker.Begin(); err != nil {
		return nil, err
	}
	defer worker.End()
	return open(worker)
}

// openExternal looks for the TOC of an eStargz layer, whose blob has none, in
// the image that its converter may have put it into. inside says what was wrong
// with the blob.
func (f *Finder) openExternal(ctx context.Context, blobs blobs, worker *sched.Worker, l Layer, toc digest.Digest, inside error) (*index.Layer, error) {
	err := worker.Wait(func() error {
		f.external.Do(func() {
			if tag, ok := f.tag(); ok {
				f.externalTOCs, f.externalErr = estargz.FindExternal(ctx, f.repo, tag, f.descriptors())
			}
		})
		return nil
	})
	if err != nil {
		return nil, err
	}
	desc, ok := f.externalTOCs[l.Digest]
	if !ok {
		if f.externalErr != nil {
			return nil, fmt.Errorf("%w; and no other image has its TOC: %w", inside, f.externalErr)
		}
		return nil, inside
	}
	body, err := blobs(desc).ReadRange(ctx, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return estargz.OpenExternal(body, desc.Size, l.Descriptor, toc)
}

// tag is the one in the image's reference.
func (f *Finder) tag() (string, bool) {
	ref, err := image.ParseReference(f.image.Reference)
	if err != nil {
		return "", false
	}
	tagged, ok := ref.(reference.Tagged)
	if !ok {
		return "", false
	}
	return tagged.Tag(), true
}

// sociWay takes the index from a ztoc.
func (f *Finder) sociWay(l Layer, ztoc soci.Ztoc) Way {
	return Way{From: FromSOCI, By: ztoc.Digest, Bound: ztoc.Bound, Open: func(ctx context.Context) (*index.Layer, int64, error) {
		data, err := f.repo.Blob(ctx, ocispec.Descriptor{Digest: ztoc.Digest, Size: ztoc.Size})
		if err != nil {
			return nil, 0, err
		}
		made, err := f.compute(ctx, func(*sched.Worker) (*index.Layer, error) {
			return soci.Open(data, ztoc.Digest, l.Descriptor)
		})
		return made, ztoc.Size, err
	}}
}

// fileWays are those by index artifacts, bound ones or others.
func (f *Finder) fileWays(l Layer, bound bool) []Way {
	var out []Way
	for _, a := range f.Artifacts {
		if desc, ok := a.Files.Layers[l.Digest]; ok && a.Bound == bound {
			out = append(out, f.fileWay(l, desc, bound))
		}
	}
	return out
}

// fileWay takes the index from a layer file of an artifact.
func (f *Finder) fileWay(l Layer, desc ocispec.Descriptor, bound bool) Way {
	return Way{From: FromIndex, By: desc.Digest, Bound: bound, Open: func(ctx context.Context) (*index.Layer, int64, error) {
		data, err := f.repo.Blob(ctx, desc)
		if err != nil {
			return nil, 0, err
		}
		made, err := f.compute(ctx, func(*sched.Worker) (*index.Layer, error) { return index.DecodeLayer(data) })
		if err == nil {
			err = checkFile(l, made)
		}
		if err != nil {
			return nil, desc.Size, fmt.Errorf("index %s of layer %s: %w", desc.Digest, l.Digest, err)
		}
		return made, desc.Size, nil
	}}
}

// checkFile says why a node has no use for what a layer file says. It must be one
// that can be held against the image once the layer is complete. Sums that are
// names would let a publisher give its chunks the names of another's.
func checkFile(l Layer, made *index.Layer) error {
	switch {
	case made.Blob != l.Digest || made.BlobSize != l.Size:
		return fmt.Errorf("it is of blob %s with %d bytes: %w", made.Blob, made.BlobSize, errdefs.ErrInvalidArgument)
	case made.Access.Format == index.Chunked || made.Table.Algorithm != index.SHA256:
		return fmt.Errorf("it is not of a tar whose chunks have digests: %w", errdefs.ErrInvalidArgument)
	case !layer.RandomAccess(made):
		return fmt.Errorf("decompressing can start in too few places, so that lazy reads cost more than the whole blob: %w", errdefs.ErrFailedPrecondition)
	case made.DiffID != l.DiffID || len(made.Skeleton) == 0:
		return fmt.Errorf("it cannot be held against the diffID %s of the image's config: %w", l.DiffID, errdefs.ErrInvalidArgument)
	}
	return nil
}
