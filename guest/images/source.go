package images

import (
	"context"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// relaySource reads plain ranges of segments from the node.
type relaySource struct {
	repo  *registry.Repository
	trust Trust
}

// Vouches implements store.Voucher: who takes the index that the node made has
// to take its word for what the index cannot check.
func (s relaySource) Vouches(*index.Segment) bool { return s.trust == TrustHost }

// FixedRank implements store.Fixed: the node was told by a header.
func (relaySource) FixedRank() bool { return true }

func (relaySource) Name() string { return SourceRelay }

func (s relaySource) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	return s.repo.SegmentRange(ctx, seg.ID, off, n)
}

// registrySource reads ranges of blobs from a registry and makes plain ones of
// them.
type registrySource struct {
	repo   *registry.Repository
	layers *layerCache
}

func (*registrySource) Name() string { return SourceRegistry }

func (s *registrySource) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	l, err := s.layers.get(cacheKey{seg.Layer, seg.ID})
	if err != nil {
		return nil, err
	}
	return registry.Trailed(ctx, func(ctx context.Context) (io.ReadCloser, error) {
		return layer.NewReader(l, s.blob).Open(ctx, off, n)
	})
}

func (s *registrySource) blob(ref index.BlobRef) layer.Blob {
	return s.repo.LayerBlob(ocispec.Descriptor{Digest: ref.Digest, Size: ref.Size})
}

// Vouches implements store.Voucher: a layer.Reader checks the spans of such
// segments before it decompresses them.
func (s *registrySource) Vouches(*index.Segment) bool { return true }
