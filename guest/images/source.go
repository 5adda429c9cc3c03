package images

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// relaySource reads plain ranges of segments from the node.
type relaySource struct{ repo *registry.Repository }

func (relaySource) Name() string { return "relay" }

func (s relaySource) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	return s.repo.SegmentRange(ctx, seg.ID, off, n)
}

// registrySource reads ranges of blobs from a registry and makes plain ones of
// them.
type registrySource struct {
	repo   *registry.Repository
	layers *layerCache
}

func (*registrySource) Name() string { return "registry" }

func (s *registrySource) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	l, err := s.layers.get(seg.Layer)
	if err != nil {
		return nil, err
	}
	if l.segment != seg.ID {
		return nil, fmt.Errorf("segment %s is not that of layer %s: %w", seg.ID, seg.Layer, errdefs.ErrNotFound)
	}
	return layer.NewReader(l.Layer, s.blob).Open(ctx, off, n)
}

func (s *registrySource) blob(ref index.BlobRef) layer.Blob {
	return s.repo.LayerBlob(ocispec.Descriptor{Digest: ref.Digest, Size: ref.Size})
}
