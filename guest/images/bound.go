package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/guest/timing"
	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// parallelLayers is how many indexes of layers are read at a time.
const parallelLayers = 4

// indexFromImage makes the index of an image from what its manifest, or the
// image index above it, binds: tables of contents, an index artifact.
func (r *Resolver) indexFromImage(ctx context.Context, img *Image, phases *timing.Phases) (*index.Image, error) {
	defer phases.Begin("toc")()
	blob := func(d ocispec.Descriptor) layer.Blob { return img.blobs.LayerBlob(d) }
	f := formats.New(img.blobs, blob, img.found, r.cfg.Log)
	wanted, err := f.Layers()
	if err != nil {
		return nil, err
	}
	f.Discover(ctx, false)
	layers := make([]*index.Layer, len(wanted))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelLayers)
	for i, l := range wanted {
		g.Go(func() (err error) {
			layers[i], err = boundLayer(gctx, f, l)
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

// boundLayer takes the first way to the layer that is bound and can be used.
func boundLayer(ctx context.Context, f *formats.Finder, l formats.Layer) (*index.Layer, error) {
	var errs []error
	for _, w := range f.Ways(l) {
		if !w.Bound {
			continue
		}
		made, _, err := w.Open(ctx)
		if err == nil {
			err = l.Check(made)
		}
		if err == nil || ctx.Err() != nil {
			return made, err
		}
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return nil, fmt.Errorf("layer %s has neither a table of contents nor an index that its manifest binds: %w", l.Digest, errdefs.ErrNotFound)
}

// layerCache keeps what is needed to read segments from a registry: in memory,
// and on disk for the next process.
type layerCache struct {
	dir string

	mu     sync.Mutex
	layers map[cacheKey]*index.Layer // without Entries and Skeleton; protected by mu
}

// cacheKey is a segment and the blob that it comes out of: there may be several
// with the same content.
type cacheKey struct {
	blob    digest.Digest
	segment index.ID
}

func (c *layerCache) path(k cacheKey) string {
	return filepath.Join(c.dir, k.blob.Encoded()+"-"+k.segment.Encoded())
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
	k := cacheKey{l.Blob, l.Table.ID()}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), c.path(k))
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	c.remember(k, l)
	return nil
}

// remember keeps what reading needs; names and attributes are in the bootstrap.
func (c *layerCache) remember(k cacheKey, l *index.Layer) *index.Layer {
	lean := *l
	lean.Entries, lean.Skeleton = nil, nil
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.layers == nil {
		c.layers = make(map[cacheKey]*index.Layer)
	}
	c.layers[k] = &lean
	return &lean
}

// KeepLayers forgets what is needed to read other layers than the given ones from a
// registry. No Resolve may run, and none may have returned an image whose layers are
// not among them.
func (r *Resolver) KeepLayers(used map[digest.Digest]bool) error { return r.layers.keepOnly(used) }

func (c *layerCache) keepOnly(used map[digest.Digest]bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.layers, func(k cacheKey, _ *index.Layer) bool { return !used[k.blob] })
	files, err := os.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, f := range files {
		blob, _, _ := strings.Cut(f.Name(), "-")
		if !used[digest.NewDigestFromEncoded(digest.SHA256, blob)] {
			errs = append(errs, os.Remove(filepath.Join(c.dir, f.Name())))
		}
	}
	return errors.Join(errs...)
}

// get is of class NotFound when nobody has put the layer.
func (c *layerCache) get(k cacheKey) (*index.Layer, error) {
	c.mu.Lock()
	l, ok := c.layers[k]
	c.mu.Unlock()
	if ok {
		return l, nil
	}
	b, err := os.ReadFile(c.path(k))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("index of layer %s: only the node has it: %w", k.blob, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	l, err = index.DecodeLayer(b)
	if err == nil && (l.Blob != k.blob || l.Table.ID() != k.segment) {
		err = fmt.Errorf("it is of another layer: %w", errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, fmt.Errorf("index of layer %s: %w", k.blob, err)
	}
	return c.remember(k, l), nil
}
