package imageindex

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tools/progress"
)

// span is how many plain bytes lie between checkpoints of a published index.
// A node that builds its own takes them closer; what is stored and sent to every
// node is to be small.
const span = 4 << 20

// Options of Build. The zero value is the usual.
type Options struct {
	// Profile lists paths of files that a start reads, in their order, for
	// Layer.Prefetch. Those that a layer does not have are passed over.
	Profile  []string
	Parallel int               // layers at a time; 0 is 2
	Progress progress.Reporter // nil is none
}

// File is one layer file of an artifact.
type File struct {
	Desc ocispec.Descriptor
	Data []byte
}

// Opener opens whole blobs and checks them.
type Opener interface {
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// Build streams every distinct layer of an image once and returns their files
// in the order of the layers. The files depend on the layers and the profile
// alone. Layers without random access (layer.RandomAccess) have no file: a node
// is faster when it streams them. It is of class ErrInvalidArgument when a layer
// is no tar (a Nydus image, which has an index of its own), ErrFailedPrecondition
// when no layer has random access.
func Build(ctx context.Context, src Opener, img *image.Image, opts Options) ([]File, error) {
	if opts.Progress == nil {
		opts.Progress = progress.None
	}
	if opts.Parallel == 0 {
		opts.Parallel = 2
	}
	layers := distinct(img.Layers)
	for _, l := range layers {
		if err := layer.CheckMediaType(l.MediaType); err != nil {
			return nil, fmt.Errorf("index image %s: layer %s: %w", img.Reference, l.Digest, err)
		}
	}
	files := make([]File, len(layers))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(opts.Parallel)
	for i, l := range layers {
		g.Go(func() (err error) {
			files[i], err = buildLayer(ctx, src, l, opts)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("index image %s: %w", img.Reference, err)
	}
	files = slices.DeleteFunc(files, func(f File) bool { return f.Data == nil })
	if len(files) == 0 && len(layers) > 0 {
		return nil, fmt.Errorf("index image %s: %w", img.Reference, errNoAccess)
	}
	return files, nil
}

var errNoAccess = fmt.Errorf("decompressing its layers can start in too few places for lazy reads; convert them (tatami convert): %w",
	errdefs.ErrFailedPrecondition)

// distinct leaves out layers that came before.
func distinct(layers []image.Layer) []image.Layer {
	seen := map[digest.Digest]bool{}
	return slices.DeleteFunc(slices.Clone(layers), func(l image.Layer) bool {
		again := seen[l.Digest]
		seen[l.Digest] = true
		return again
	})
}

func buildLayer(ctx context.Context, src Opener, l image.Layer, opts Options) (File, error) {
	job := opts.Progress.Start("index "+l.Digest.Encoded()[:12], l.Size)
	file, err := encodeLayer(ctx, src, l, opts, job)
	note := ""
	switch {
	case err != nil:
		note = "failed"
	case file.Data == nil:
		note = "left out: it cannot be read lazily"
	}
	job.Done(note)
	return file, err
}

// encodeLayer returns no data for a layer that has no random access.
func encodeLayer(ctx context.Context, src Opener, l image.Layer, opts Options, job progress.Job) (File, error) {
	body, err := src.Open(ctx, l.Descriptor)
	if err != nil {
		return File{}, err
	}
	defer body.Close()
	told := int64(0)
	made, err := layer.Build(ctx, body, l.Descriptor, layer.Discard, layer.Options{
		Span: span, Skeleton: true,
		Progress: func(read int64) { job.Add(read - told); told = read },
	})
	if err == nil {
		err = l.CheckDiffID(made.DiffID)
	}
	if err != nil {
		return File{}, err
	}
	if !layer.RandomAccess(made) {
		return File{}, nil
	}
	made.Prefetch = prefetch(made.Entries, opts.Profile)
	data, err := index.EncodeLayer(made)
	if err != nil {
		return File{}, err
	}
	return File{artifact.LayerFile(l.Digest, data), data}, nil
}
