// Package inspect tells how an image can be read lazily: which ways lead to each
// layer's index, how it is cut into chunks, and what is in it more than once. It
// reads what a node reads before it mounts the image, and no more unless asked.
package inspect

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

// Options of Image. The zero value reads no whole layer.
type Options struct {
	Build    bool // stream layers to which no way leads
	Progress progress.Reporter
	Log      *slog.Logger // hears of ways that cannot be used
}

// Report is what is known of an image. Sizes are in bytes.
type Report struct {
	Reference string        `json:"reference"`
	Manifest  digest.Digest `json:"manifest"`
	MediaType string        `json:"mediaType"`
	Platform  string        `json:"platform"`
	Parent    digest.Digest `json:"parent,omitempty"` // the image index it was chosen from
	Artifacts []Artifact    `json:"artifacts,omitempty"`
	Blobs     []Blob        `json:"blobs"` // the manifest's layers
	Layers    []Layer       `json:"layers"`

	Compressed int64 `json:"compressed"` // all blobs
	Chunks     int   `json:"chunks"`
	Plain      int64 `json:"plain"`  // all chunks
	Unique     int64 `json:"unique"` // chunks, each sum once
	Lazy       bool  `json:"lazy"`   // every layer has a way that leads to an index
}

// Artifact is an index artifact of the image.
type Artifact struct {
	Digest digest.Digest `json:"digest"`
	Bound  bool          `json:"bound"`
	Size   int64         `json:"size"` // of its files
}

// Blob is a layer of the manifest.
type Blob struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	Size      int64         `json:"size"`
}

// Layer is one layer as it is merged.
type Layer struct {
	Blob  digest.Digest `json:"blob"`
	Ways  []Way         `json:"ways"`
	From  string        `json:"from,omitempty"` // the way that was taken, or "built"
	Index *Index        `json:"index,omitempty"`
	Error string        `json:"error,omitempty"` // why there is no index
}

// Way is one that leads to a layer's index.
type Way struct {
	From  string        `json:"from"`
	By    digest.Digest `json:"by"`
	Bound bool          `json:"bound"`
}

// Index is what an index says.
type Index struct {
	Format   string `json:"format"`
	Sums     string `json:"sums"`
	Entries  int    `json:"entries"`
	Chunks   int    `json:"chunks"`
	Plain    int64  `json:"plain"`
	Largest  int64  `json:"largest"` // chunk
	Prefetch int64  `json:"prefetch"`
	Fetched  int64  `json:"fetched"` // to get the index
	DiffID   bool   `json:"diffID"`  // it can be checked once the layer is complete
}

// Image inspects one image.
func Image(ctx context.Context, src transport.Source, img *image.Image, opts Options) (*Report, error) {
	if opts.Progress == nil {
		opts.Progress = progress.None
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	f := formats.New(src, src.LayerBlob, img, opts.Log)
	layers, err := f.Layers()
	if err != nil {
		return nil, fmt.Errorf("inspect image %s: %w", img.Reference, err)
	}
	f.Discover(ctx, true)
	r := newReport(img, f)
	sums := map[chunk]bool{}
	for _, l := range layers {
		out, made, err := inspectLayer(ctx, src, f, l, opts)
		if err != nil {
			return nil, fmt.Errorf("inspect image %s: %w", img.Reference, err)
		}
		r.Layers = append(r.Layers, out)
		r.Lazy = r.Lazy && made != nil && out.From != fromBlob
		if made != nil {
			r.count(&made.Table, sums)
		}
	}
	return r, nil
}

func newReport(img *image.Image, f *formats.Finder) *Report {
	r := &Report{
		Reference: img.Reference, Manifest: img.Desc.Digest, MediaType: img.Desc.MediaType,
		Platform: image.FormatPlatform(transport.PlatformOf(img)), Parent: img.ParentDesc.Digest, Lazy: true,
	}
	for _, l := range img.Layers {
		r.Blobs = append(r.Blobs, Blob{l.Digest, l.MediaType, l.Size})
		r.Compressed += l.Size
	}
	for _, a := range f.Artifacts {
		size := int64(0)
		for _, desc := range a.Files.Layers {
			size += desc.Size
		}
		r.Artifacts = append(r.Artifacts, Artifact{a.Desc.Digest, a.Bound, size})
	}
	return r
}

// chunk is what makes chunks the same.
type chunk struct {
	algorithm index.Algorithm
	sum       index.Sum
	len       int64
}

func (r *Report) count(t *index.Table, seen map[chunk]bool) {
	for _, c := range t.Chunks {
		r.Chunks++
		r.Plain += c.Len
		key := chunk{t.Algorithm, c.Sum, c.Len}
		if !seen[key] {
			r.Unique += c.Len
		}
		seen[key] = true
	}
}

// fromBlob is where an index comes from that was made of the whole blob.
const fromBlob = "built"

// inspectLayer takes the first way that leads to an index.
func inspectLayer(ctx context.Context, src transport.Source, f *formats.Finder, l formats.Layer, opts Options) (Layer, *index.Layer, error) {
	out := Layer{Blob: l.Digest}
	ways := f.Ways(l)
	for _, w := range ways {
		out.Ways = append(out.Ways, Way{w.From, w.By, w.Bound})
	}
	for _, w := range ways {
		made, fetched, err := w.Open(ctx)
		if err == nil {
			out.From, out.Error, out.Index = w.From, "", describe(made, fetched)
			return out, made, nil
		}
		if ctx.Err() != nil {
			return out, nil, err
		}
		opts.Log.Warn("a way to a layer cannot be used", "layer", l.Digest, "from", w.From, "error", err)
		out.Error = err.Error()
	}
	if !l.Whole || !opts.Build {
		return out, nil, nil
	}
	made, err := build(ctx, src, l, opts.Progress)
	if err != nil {
		return out, nil, err
	}
	out.From, out.Error, out.Index = fromBlob, "", describe(made, l.Size)
	return out, made, nil
}

func build(ctx context.Context, src transport.Source, l formats.Layer, p progress.Reporter) (*index.Layer, error) {
	body, err := src.Open(ctx, l.Descriptor)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	job := p.Start("layer "+l.Digest.Encoded()[:12], l.Size)
	defer job.Done("")
	told := int64(0)
	return layer.Build(ctx, body, l.Descriptor, layer.Discard, layer.Options{Progress: func(n int64) { job.Add(n - told); told = n }})
}

func describe(l *index.Layer, fetched int64) *Index {
	out := &Index{
		Format: l.Access.Format.String(), Sums: l.Table.Algorithm.String(), Entries: len(l.Entries),
		Chunks: len(l.Table.Chunks), Fetched: fetched, DiffID: l.DiffID != "" && len(l.Skeleton) > 0,
	}
	for _, c := range l.Table.Chunks {
		out.Plain += c.Len
		out.Largest = max(out.Largest, c.Len)
	}
	for _, r := range l.Prefetch {
		out.Prefetch += r.Len
	}
	return out
}
