// Package check reads all of an image in every way in which a node could, and
// holds what comes out against an independent reading of the layers: by the
// standard library's tar and other decompressors than ours. Every chunk, every
// file, its attributes and the whole layer's diffID are compared.
package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

// Report says what was checked and found. Sizes are in bytes.
type Report struct {
	Reference string        `json:"reference"`
	Manifest  digest.Digest `json:"manifest"`
	Platform  string        `json:"platform"`
	Layers    []Layer       `json:"layers"`
	Problems  int           `json:"problems"`
}

// Layer is one layer of the image.
type Layer struct {
	Blob digest.Digest `json:"blob"`
	Ways []Way         `json:"ways"`
}

// Way is one that leads to the layer's bytes, and what was found on it.
type Way struct {
	From     string        `json:"from"`
	By       digest.Digest `json:"by,omitempty"`
	Entries  int           `json:"entries"`
	Chunks   int           `json:"chunks"`
	Bytes    int64         `json:"bytes"`              // of chunks, each read and verified
	Compared bool          `json:"compared"`           // with an independent reading; there is none of Nydus blobs
	Problems []string      `json:"problems,omitempty"` // the first of them
	More     int           `json:"more,omitempty"`     // problems that are not listed
}

// maxProblems is how many problems of one way are listed.
const maxProblems = 20

func (w *Way) problem(format string, args ...any) {
	if len(w.Problems) == maxProblems {
		w.More++
		return
	}
	w.Problems = append(w.Problems, fmt.Sprintf(format, args...))
}

// fromBlob is the way of reading a whole blob once.
const fromBlob = "built"

// checker checks one image.
type checker struct {
	src      transport.Source
	progress progress.Reporter
}

// Image checks one image. The error says that it could not be checked to the
// end; what is wrong with the image is in the report.
func Image(ctx context.Context, src transport.Source, img *image.Image, p progress.Reporter, log *slog.Logger) (*Report, error) {
	c := checker{src, p}
	r := &Report{Reference: img.Reference, Manifest: img.Desc.Digest, Platform: image.FormatPlatform(transport.PlatformOf(img))}
	f := formats.New(src, src.LayerBlob, img, log)
	layers, err := f.Layers()
	if err != nil {
		return nil, fmt.Errorf("check image %s: %w", img.Reference, err)
	}
	f.Discover(ctx, true)
	merged := make([]*index.Layer, 0, len(layers))
	done := map[digest.Digest]*index.Layer{}
	for _, l := range layers {
		if made, ok := done[l.Digest]; ok {
			merged = append(merged, made)
			continue
		}
		out, made, err := c.layer(ctx, f, l)
		if err != nil {
			return nil, fmt.Errorf("check image %s: layer %s: %w", img.Reference, l.Digest, err)
		}
		r.Layers = append(r.Layers, out)
		done[l.Digest], merged = made, append(merged, made)
	}
	r.merge(img.Desc.Digest, merged)
	r.sum()
	return r, nil
}

// merge checks that the layers make an image.
func (r *Report) merge(manifest digest.Digest, layers []*index.Layer) {
	for _, l := range layers {
		if l == nil {
			return // a problem that was reported
		}
	}
	if _, err := bootstrap.Build(manifest, layers); err != nil {
		w := Way{From: "merge"}
		w.problem("%v", err)
		r.Layers = append(r.Layers, Layer{Ways: []Way{w}})
	}
}

func (r *Report) sum() {
	for _, l := range r.Layers {
		for _, w := range l.Ways {
			r.Problems += len(w.Problems) + w.More
		}
	}
}

// layer checks one layer, and returns its index if there is a good one.
func (c *checker) layer(ctx context.Context, f *formats.Finder, l formats.Layer) (Layer, *index.Layer, error) {
	out := Layer{Blob: l.Digest}
	var want *contents
	var made *index.Layer
	if l.Whole {
		w, built, err := c.whole(ctx, l)
		if err != nil {
			return out, nil, err
		}
		out.Ways, made, want = append(out.Ways, w.Way), built, w.contents
	}
	for _, way := range f.Ways(l) {
		w := Way{From: way.From, By: way.By}
		found, _, err := way.Open(ctx)
		if err == nil {
			err = c.verify(ctx, &w, l, found, want)
		}
		if ctx.Err() != nil {
			return out, nil, context.Cause(ctx)
		}
		if err != nil {
			w.problem("%v", err)
		}
		if made == nil && len(w.Problems) == 0 {
			made = found
		}
		out.Ways = append(out.Ways, w)
	}
	if len(out.Ways) == 0 {
		return out, nil, errors.New("no way leads to it")
	}
	return out, made, nil
}

// wholeWay is the way of a whole blob, with what an independent reading of it
// has found.
type wholeWay struct {
	Way
	contents *contents
}

// whole reads the blob once independently, which also checks the diffID, and
// once as a node does.
func (c *checker) whole(ctx context.Context, l formats.Layer) (wholeWay, *index.Layer, error) {
	w := wholeWay{Way: Way{From: fromBlob}}
	want, diffID, err := c.read(ctx, l)
	switch {
	case ctx.Err() != nil:
		return w, nil, context.Cause(ctx)
	case errdefs.IsUnavailable(err):
		return w, nil, err
	case err != nil:
		w.problem("%v", err)
		return w, nil, nil
	}
	if err := l.CheckDiffID(diffID); err != nil {
		w.problem("independent unpack: %v", err)
	}
	w.contents = want
	made, err := c.build(ctx, l)
	if err == nil {
		err = c.verify(ctx, &w.Way, l, made, want)
	}
	if ctx.Err() != nil {
		return w, nil, context.Cause(ctx)
	}
	if err != nil {
		w.problem("%v", err)
		return w, nil, nil
	}
	return w, made, nil
}

func (c *checker) build(ctx context.Context, l formats.Layer) (*index.Layer, error) {
	body, err := c.src.Open(ctx, l.Descriptor)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return layer.Build(ctx, body, l.Descriptor, layer.Discard, layer.Options{Skeleton: true})
}
