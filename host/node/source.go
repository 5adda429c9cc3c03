package node

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// source reads segments out of the layers' blobs in one repository.
type source struct {
	n      *Node
	repo   *registry.Repository
	layers []layerRecord
}

var _ store.Source = (*source)(nil)

// Name implements store.Source.
func (s *source) Name() string { return "registry" }

// Fetch implements store.Source.
func (s *source) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	for _, l := range s.layers {
		if l.Digest != seg.Layer {
			continue
		}
		access, err := s.n.access.get(ctx, l.key())
		if err != nil {
			return nil, err
		}
		return layer.NewReader(access, s.blobs(l)).Open(ctx, off, n)
	}
	return nil, fmt.Errorf("segment %s belongs to layer %s, which the image does not have: %w", seg.ID, seg.Layer, errdefs.ErrNotFound)
}

// blobs finds the blobs of a layer in the repository.
func (s *source) blobs(l layerRecord) layer.Blobs {
	return func(ref index.BlobRef) layer.Blob {
		if ref.Digest == l.Digest {
			return s.repo.LayerBlob(l.Descriptor)
		}
		return s.repo.LayerBlob(layer.Descriptor{Digest: ref.Digest, Size: ref.Size})
	}
}
