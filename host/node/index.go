package node

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// indexed is how an image came to its index.
type indexed struct {
	from    string
	fetched int64 // bytes of layers
	phases  []Phase
}

// checkLayer refuses a layer that cannot be served, before anything of the
// image is fetched.
func checkLayer(l image.Layer) error {
	if err := layer.CheckMediaType(l.MediaType); err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	return nil
}

// index makes an image exist on the node, unless it does.
func (n *Node) index(ctx context.Context, repo *registry.Repository, img *image.Image) (indexed, error) {
	if _, ok := n.known(img.Desc.Digest); ok {
		return indexed{from: fromNode}, nil
	}
	c := newClock()
	unpin := n.pin(img)
	layers, err := n.indexLayers(ctx, repo, img)
	if err != nil {
		unpin()
		if errdefs.IsDataLoss(err) {
			n.sweep(allKeys(img)) // nothing of a damaged or forged image is kept
		}
		return indexed{}, err
	}
	defer unpin()
	c.mark("layers")
	out := summary(layers)
	if err := n.assemble(ctx, img, layers, c); err != nil {
		return indexed{}, outOfSpace(err)
	}
	out.phases = c.phases
	return out, nil
}

// summary says where an image's index came from: from the most expensive way
// that any layer took.
func summary(layers []*layerIndex) indexed {
	rank := map[string]int{fromNode: 0, fromTOC: 1, fromBlob: 2}
	out := indexed{from: fromNode}
	seen := map[layerKey]bool{}
	for _, l := range layers {
		if rank[l.from] > rank[out.from] {
			out.from = l.from
		}
		if !seen[l.key] {
			out.fetched += l.bytes
		}
		seen[l.key] = true
	}
	return out
}

// indexLayers has all layers indexed, a bounded number at a time.
func (n *Node) indexLayers(ctx context.Context, repo *registry.Repository, img *image.Image) ([]*layerIndex, error) {
	out := make([]*layerIndex, len(img.Layers))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(n.cfg.Layers)
	progress := n.startProgress(img)
	defer progress.end()
	for i, l := range img.Layers {
		group.Go(func() (err error) {
			out[i], err = n.layer(ctx, repo, l, func(bytes *atomic.Int64) { progress.watch(l.Digest, bytes) })
			return err
		})
	}
	return out, group.Wait()
}

// assemble merges the layers, hands the image to the store and keeps its record.
func (n *Node) assemble(ctx context.Context, img *image.Image, layers []*layerIndex, c *clock) error {
	merged := make([]*index.Layer, len(layers))
	for i, l := range layers {
		merged[i] = l.layer
	}
	built, err := bootstrap.Build(img.Desc.Digest, merged)
	if err != nil {
		return err
	}
	c.mark("bootstrap")
	encoded, err := index.EncodeImage(built)
	if err != nil {
		return err
	}
	c.mark("encode")
	open, err := n.store.OpenImage(ctx, built, nil)
	if err != nil {
		return err
	}
	if err := open.Close(); err != nil {
		return fmt.Errorf("close image %s: %w", img.Desc.Digest, err)
	}
	if err := n.keepImage(img, layers, built, encoded); err != nil {
		return err
	}
	c.mark("keep")
	return nil
}

// keepImage writes the record and makes the image known.
func (n *Node) keepImage(img *image.Image, layers []*layerIndex, built *index.Image, encoded []byte) error {
	blob := describe(index.ImageType, encoded)
	art, manifest, err := artifact(img.Desc, blob)
	if err != nil {
		return err
	}
	r := &record{
		Version: recordVersion, Manifest: bare(img.Desc), Config: bare(img.Manifest.Config),
		Artifact: art, Index: blob, ImageSize: built.Size(),
	}
	for i, l := range img.Layers {
		r.Layers = append(r.Layers, layerRecord{bare(l.Descriptor), layers[i].key.toc})
	}
	for _, s := range built.Segments {
		r.Segments = append(r.Segments, segmentRecord{s.ID, s.Table.Size})
	}
	err = n.saveImage(r, map[string][]byte{
		manifestFile: img.ManifestBytes, configFile: img.ConfigBytes, artifactFile: manifest, indexFile: encoded,
	})
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.images[r.Manifest.Digest] = r
	n.mu.Unlock()
	return nil
}

// bare leaves of a descriptor what names the content.
func bare(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}
