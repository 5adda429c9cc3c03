package transport

import (
	"cmp"
	"context"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

var (
	_ Source = (*registrySource)(nil)
	_ Dest   = (*registryDest)(nil)
)

// registrySource is a repository of a registry. Its client belongs to the caller.
type registrySource struct {
	*registry.Repository
	object string
}

func newRegistrySource(n Name, c *registry.Client) *registrySource {
	return &registrySource{Repository: c.Repository(n.Reference), object: n.Object}
}

func (s *registrySource) GetManifest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	return s.Repository.GetManifest(ctx, cmp.Or(ref, s.object))
}

func (s *registrySource) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	rc, err := s.Repository.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	return verified{registry.Verify(rc, desc), rc}, nil
}

func (s *registrySource) LayerBlob(desc ocispec.Descriptor) layer.Blob {
	return s.Repository.LayerBlob(desc)
}

func (s *registrySource) Close() error { return nil }

// verified reads through a check and closes what is behind it.
type verified struct {
	io.Reader
	io.Closer
}

// registryDest is a repository of a registry. Its client belongs to the caller.
type registryDest struct {
	*registry.Repository
	tag string
}

func newRegistryDest(n Name, c *registry.Client) *registryDest {
	return &registryDest{Repository: c.Repository(n.Reference), tag: n.Object}
}

func (d *registryDest) Mount(ctx context.Context, desc ocispec.Descriptor, from Source) (bool, error) {
	src, ok := from.(*registrySource)
	if !ok {
		return false, nil
	}
	return d.MountBlob(ctx, desc, src.Repository)
}

func (d *registryDest) Tag() string  { return d.tag }
func (d *registryDest) Close() error { return nil }
