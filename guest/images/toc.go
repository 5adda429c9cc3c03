package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/guest/timing"
	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/estargz"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// parallelTOCs is how many tables of contents are read at a time.
const parallelTOCs = 4

// indexFromTOC makes the index of an image whose layers all carry a table of
// contents that the manifest binds.
func (r *Resolver) indexFromTOC(ctx context.Context, img *Image, phases *timing.Phases) (*index.Image, error) {
	defer phases.Begin("toc")()
	layers := make([]*index.Layer, len(img.Layers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelTOCs)
	for i, desc := range img.Layers {
		g.Go(func() (err error) {
			layers[i], err = openTOC(gctx, img.blobs, desc)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, l := range layers {
		if err := r.layers.put(l); err != nil {
			return nil, err
		}
	}
	return bootstrap.Build(img.Manifest, layers)
}

func openTOC(ctx context.Context, repo *registry.Repository, desc ocispec.Descriptor) (*index.Layer, error) {
	toc := desc.Annotations[estargz.TOCDigest]
	if toc == "" {
		return nil, fmt.Errorf("layer %s has no table of contents that its manifest binds: %w", desc.Digest, errdefs.ErrNotFound)
	}
	d, err := digest.Parse(toc)
	if err != nil {
		return nil, fmt.Errorf("layer %s: digest of its table of contents %q: %w: %w", desc.Digest, toc, err, errdefs.ErrInvalidArgument)
	}
	l, err := estargz.Open(ctx, repo.LayerBlob(desc), desc, d)
	if err != nil {
		return nil, fmt.Errorf("table of contents of layer %s: %w", desc.Digest, err)
	}
	return l, nil
}

// layerCache keeps what is needed to read layers from a registry: in memory,
// and on disk for the next process. Names are digests of blobs.
type layerCache struct {
	dir string

	mu     sync.Mutex
	layers map[digest.Digest]cachedLayer // protected by mu
}

type cachedLayer struct {
	*index.Layer          // without Entries
	segment      index.ID // of its table
}

func (c *layerCache) path(d digest.Digest) string {
	return filepath.Join(c.dir, d.Algorithm().String()+"-"+d.Encoded())
}

func (c *layerCache) put(l *index.Layer) error {
	b, err := index.EncodeLayer(l)
	if err != nil {
		return fmt.Errorf("keep index of layer %s: %w", l.Blob, err)
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	// Two containers of one image may come at once: each writes a file of its own.
	tmp, err := os.CreateTemp(c.dir, "new-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), c.path(l.Blob))
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	c.remember(l)
	return nil
}

// remember keeps what reading needs; names and attributes are in the bootstrap.
func (c *layerCache) remember(l *index.Layer) cachedLayer {
	lean := *l
	lean.Entries = nil
	cached := cachedLayer{&lean, l.Table.ID()}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.layers == nil {
		c.layers = make(map[digest.Digest]cachedLayer)
	}
	c.layers[l.Blob] = cached
	return cached
}

// get is of class NotFound when nobody has put the layer.
func (c *layerCache) get(blob digest.Digest) (cachedLayer, error) {
	c.mu.Lock()
	cached, ok := c.layers[blob]
	c.mu.Unlock()
	if ok {
		return cached, nil
	}
	b, err := os.ReadFile(c.path(blob))
	if errors.Is(err, fs.ErrNotExist) {
		return cachedLayer{}, fmt.Errorf("index of layer %s: only the node has it: %w", blob, errdefs.ErrNotFound)
	}
	if err != nil {
		return cachedLayer{}, err
	}
	l, err := index.DecodeLayer(b)
	if err != nil {
		return cachedLayer{}, fmt.Errorf("index of layer %s: %w", blob, err)
	}
	return c.remember(l), nil
}
