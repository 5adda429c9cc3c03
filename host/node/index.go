package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// indexed is how an image came to its index.
type indexed struct {
	from    string
	fetched int64 // bytes of layers
	phases  []Phase
}

// index makes an image exist on the node, unless it does.
func (n *Node) index(ctx context.Context, repo *registry.Repository, img *image.Image, f *formats.Finder, wanted []formats.Layer) (indexed, error) {
	if r, ok := n.known(img.Desc.Digest); ok {
		if r.Origin == "" || r.Origin == repo.Name() {
			return indexed{from: fromNode}, nil
		}
		// What another repository published of the same image does not count here.
		if err := n.Remove(img.Desc.Digest); err != nil {
			return indexed{}, fmt.Errorf("the node has the image with an index that %s published: %w", r.Origin, err)
		}
	}
	c := newClock()
	unpin := n.pin(wanted)
	layers, err := n.indexLayers(ctx, repo, img, f, wanted)
	if err != nil {
		unpin()
		if errdefs.IsDataLoss(err) {
			n.sweep(allKeys(f, wanted)) // nothing of a damaged or forged image is kept
		}
		return indexed{}, err
	}
	defer unpin()
	c.mark("layers")
	out := summary(layers)
	out.fetched += f.Fetched
	if err := n.assemble(ctx, repo, img, f, layers, c); err != nil {
		return indexed{}, outOfSpace(err)
	}
	out.phases = c.phases
	return out, nil
}

// summary says where an image's index came from: from the most expensive way
// that any layer took.
func summary(layers []*layerIndex) indexed {
	rank := map[string]int{fromNode: 0, formats.FromTOC: 1, formats.FromNydus: 2, formats.FromIndex: 3, formats.FromSOCI: 4, fromBlob: 5}
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
func (n *Node) indexLayers(ctx context.Context, repo *registry.Repository, img *image.Image, f *formats.Finder, wanted []formats.Layer) ([]*layerIndex, error) {
	f.Discover(ctx, slices.ContainsFunc(wanted, func(l formats.Layer) bool {
		return len(f.Ways(l)) == 0 && !n.hasLayer(l.Digest)
	}))
	out := make([]*layerIndex, len(wanted))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(n.cfg.Layers)
	progress := n.startProgress(img)
	defer progress.end()
	for i, l := range wanted {
		group.Go(func() (err error) {
			out[i], err = n.layer(ctx, repo, f, l, func(bytes *atomic.Int64) { progress.watch(l.Descriptor, bytes) })
			return err
		})
	}
	return out, group.Wait()
}

// assemble merges the layers, hands the image to the store and keeps its record.
func (n *Node) assemble(ctx context.Context, repo *registry.Repository, img *image.Image, f *formats.Finder, layers []*layerIndex, c *clock) error {
	merged := make([]*index.Layer, len(layers))
	for i, l := range layers {
		merged[i] = l.layer
	}
	built, encoded, err := n.merge(ctx, img, merged, c)
	if err != nil {
		return err
	}
	open, err := n.store.OpenImage(ctx, built, nil)
	if err != nil {
		return err
	}
	if err := open.Close(); err != nil {
		return fmt.Errorf("close image %s: %w", img.Desc.Digest, err)
	}
	r, err := n.keepImage(repo, img, f, layers, built, encoded)
	if err != nil {
		return err
	}
	n.auditKept(r)
	c.mark("keep")
	return nil
}

// merge makes an image out of its layers, and its index.
func (n *Node) merge(ctx context.Context, img *image.Image, layers []*index.Layer, c *clock) (*index.Image, []byte, error) {
	leave, err := n.cfg.Sched.CPU().Enter(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer leave()
	built, err := bootstrap.Build(img.Desc.Digest, layers)
	if err != nil {
		return nil, nil, err
	}
	c.mark("bootstrap")
	encoded, err := index.EncodeImage(built)
	if err != nil {
		return nil, nil, err
	}
	c.mark("encode")
	return built, encoded, nil
}

// keepImage writes the record and makes the image known.
func (n *Node) keepImage(repo *registry.Repository, img *image.Image, f *formats.Finder, layers []*layerIndex, built *index.Image, encoded []byte) (*record, error) {
	blob := artifact.Describe(index.ImageType, encoded)
	art, manifest, err := artifact.New(img.Desc, blob)
	if err != nil {
		return nil, err
	}
	r := &record{
		Version: recordVersion, Manifest: bare(img.Desc), Config: bare(img.Manifest.Config),
		Artifact: art, Index: blob, ImageSize: built.Size(),
	}
	for _, l := range img.Layers {
		r.Blobs = append(r.Blobs, bare(l.Descriptor))
	}
	for _, l := range layers {
		r.Layers = append(r.Layers, layerRecord{l.key.blob, l.key.by})
		if l.published {
			r.Origin = repo.Name()
		}
	}
	for _, s := range built.Segments {
		r.Segments = append(r.Segments, segmentRecord{s.ID, s.Layer, s.Table.Size})
	}
	content := map[string][]byte{
		manifestFile: img.ManifestBytes, configFile: img.ConfigBytes, artifactFile: manifest, indexFile: encoded,
	}
	keepBound(r, content, img, f)
	if err := n.saveImage(r, content); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.images[r.Manifest.Digest] = r
	return r, nil
}

// keepBound keeps the image index and the index artifact that it binds, for
// guests that believe nothing else.
func keepBound(r *record, content map[string][]byte, img *image.Image, f *formats.Finder) {
	if img.Parent == nil {
		return
	}
	r.Parent, content[parentFile] = bare(img.ParentDesc), img.ParentBytes
	for _, a := range f.Artifacts {
		if a.Bound {
			r.Bound, content[boundFile] = bare(a.Desc), a.Data
			r.BoundFiles = slices.Collect(maps.Values(a.Files.Layers))
		}
	}
}

// bare leaves of a descriptor what names the content.
func bare(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}
