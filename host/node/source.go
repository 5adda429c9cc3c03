package node

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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

var (
	_ store.Source  = (*source)(nil)
	_ store.Voucher = (*source)(nil)
)

// Name implements store.Source.
func (s *source) Name() string { return "registry" }

// Fetch implements store.Source.
func (s *source) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	for _, l := range s.layers {
		if l.Blob != seg.Layer {
			continue
		}
		access, err := s.n.access.get(ctx, l.key())
		if err != nil {
			return nil, err
		}
		return registry.Trailed(ctx, func(ctx context.Context) (io.ReadCloser, error) {
			return layer.NewReader(access, s.blob).Under(s.n.cfg.Sched.CPU()).Open(ctx, off, n)
		})
	}
	return nil, fmt.Errorf("segment %s belongs to layer %s, which the image does not have: %w", seg.ID, seg.Layer, errdefs.ErrNotFound)
}

func (s *source) blob(ref index.BlobRef) layer.Blob {
	return s.repo.LayerBlob(ocispec.Descriptor{Digest: ref.Digest, Size: ref.Size})
}

// Vouches implements store.Voucher: a layer.Reader checks the spans of such
// segments before it decompresses them.
func (s *source) Vouches(*index.Segment) bool { return true }
