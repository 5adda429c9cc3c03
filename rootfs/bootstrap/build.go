package bootstrap

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Build merges layers, lowest first, into the image of the given manifest.
// Layers with equal tables share a segment, and a layer without data has none.
// The result depends on the arguments alone. The layers are only read; the
// image refers to their tables.
//
// Errors name the layer and the path; they are of the class
// errdefs.ErrInvalidArgument, as only the layers can be at fault.
func Build(manifest digest.Digest, layers []*index.Layer) (*index.Image, error) {
	img, err := build(manifest, layers)
	if err != nil {
		return nil, fmt.Errorf("build image %s: %w", manifest, err)
	}
	return img, nil
}

func build(manifest digest.Digest, layers []*index.Layer) (*index.Image, error) {
	t := newTree(layers)
	for n := range layers {
		if err := t.apply(n); err != nil {
			return nil, err
		}
	}
	p, err := newPlan(t)
	if err != nil {
		return nil, err
	}
	segments, places, err := placeSegments(layers, p.size)
	if err != nil {
		return nil, err
	}
	img := &index.Image{Manifest: manifest, Segments: segments}
	img.Bootstrap = p.write(places, img)
	return img, nil
}

// placeSegments puts the segments behind a bootstrap of the given size in
// bytes. places has the offset in the image of each layer's segment.
func placeSegments(layers []*index.Layer, bootstrap int64) (segments []index.Segment, places []int64, err error) {
	end := bootstrap
	known := make(map[index.ID]int64, len(layers))
	places = make([]int64, len(layers))
	for n, l := range layers {
		if l.Table.Size == 0 {
			continue
		}
		id := l.Table.ID()
		off, ok := known[id]
		if !ok {
			// One block less than the limit: the superblock counts blocks in 32 bits.
			if l.Table.Size >= index.MaxImage-end {
				return nil, nil, invalid("layer %s: its files make the image larger than %d TiB, which EROFS cannot address", l.Blob, index.MaxImage>>40)
			}
			off = end
			known[id] = off
			segments = append(segments, index.Segment{ID: id, Layer: l.Blob, Off: off, Table: &l.Table, Prefetch: l.Prefetch})
			end += l.Table.Size
		}
		places[n] = off
	}
	if len(segments) > index.MaxSegments {
		return nil, nil, invalid("%d layers with data are over %d", len(segments), index.MaxSegments)
	}
	return segments, places, nil
}

// invalid says that a layer is at fault.
func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
