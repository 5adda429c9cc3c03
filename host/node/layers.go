package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/estargz"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// maxLayerFile bounds an encoded layer index in bytes.
const maxLayerFile = 4 << 30

// layerKey names a layer index: that of a blob, and of the TOC that it was
// taken from, empty when it was built from the whole blob.
type layerKey struct{ blob, toc digest.Digest }

func (n *Node) layerPath(k layerKey) string {
	path := n.files.layer(k.blob)
	if k.toc != "" {
		path += "." + k.toc.Encoded()
	}
	return path
}

// Where an index came from.
const (
	fromNode = "node"
	fromTOC  = "toc"
	fromBlob = "built"
)

// layerIndex is a layer index as far as a bootstrap needs it: without Access.
type layerIndex struct {
	key   layerKey
	layer *index.Layer
	from  string
	bytes int64 // of the blob that were fetched for it
}

// readLayer reads a whole layer index from the disk.
func (n *Node) readLayer(k layerKey) (*index.Layer, error) {
	data, err := readBounded(n.layerPath(k), maxLayerFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("index of layer %s is not on the node: %w", k.blob, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read index of layer %s: %w", k.blob, err)
	}
	l, err := index.DecodeLayer(data)
	if err == nil && l.Blob != k.blob {
		err = fmt.Errorf("it is that of %s: %w", l.Blob, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, fmt.Errorf("read index of layer %s: %w", k.blob, err)
	}
	return l, nil
}

// keptLayer returns the layer index of the first key that the node has.
func (n *Node) keptLayer(keys ...layerKey) *layerIndex {
	for _, k := range keys {
		l, err := n.readLayer(k)
		if err == nil {
			l.Access = index.Access{}
			return &layerIndex{key: k, layer: l, from: fromNode}
		}
		if !errdefs.IsNotFound(err) {
			n.log.Warn("a layer index is damaged and will be made again", "layer", k.blob, "error", err)
		}
	}
	return nil
}

// hasLayer says whether keptLayer would find something, without reading it.
func (n *Node) hasLayer(keys ...layerKey) bool {
	for _, k := range keys {
		if _, err := os.Stat(n.layerPath(k)); err == nil {
			return true
		}
	}
	return false
}

// keys are the layer indexes that may be used for l, the best first: one that
// was built from the blob speaks for the blob whatever the manifest says of TOCs.
func keys(l image.Layer) []layerKey {
	out := []layerKey{{blob: l.Digest}}
	if toc, ok := tocOf(l); ok {
		out = append(out, layerKey{l.Digest, toc})
	}
	return out
}

func tocOf(l image.Layer) (digest.Digest, bool) {
	toc := digest.Digest(l.Annotations[estargz.TOCDigest])
	return toc, toc.Validate() == nil
}

// layer finds or makes the index of one layer. Whoever else needs the same
// layer at this time shares the work; watch gets its counter of bytes.
func (n *Node) layer(ctx context.Context, repo *registry.Repository, l image.Layer, watch func(*atomic.Int64)) (*layerIndex, error) {
	if kept := n.keptLayer(keys(l)...); kept != nil {
		return kept, checkDiffID(kept.layer, l)
	}
	if made := n.tocLayer(ctx, repo, l); made != nil {
		return made, nil
	}
	key := layerKey{blob: l.Digest}
	build := func(ctx context.Context, bytes *atomic.Int64) (*layerIndex, error) {
		if kept := n.keptLayer(key); kept != nil { // made since the look above
			return kept, nil
		}
		return n.buildLayer(ctx, repo, l, bytes)
	}
	made, shared, err := n.layers.do(ctx, key, build, watch)
	if err != nil && shared && ctx.Err() == nil {
		// It failed in the repository of another image; this one may do better.
		made, _, err = n.layers.do(ctx, key, build, watch)
	}
	if err != nil {
		return nil, outOfSpace(err)
	}
	return made, checkDiffID(made.layer, l)
}

// checkDiffID compares what a layer unpacked to with what the image's config
// says. A TOC does not tell, and other algorithms than the node's cannot be
// compared. Each image is compared by itself: of two that share a layer one
// may be forged.
func checkDiffID(l *index.Layer, want image.Layer) error {
	if l.DiffID == "" || l.DiffID == want.DiffID || l.DiffID.Algorithm() != want.DiffID.Algorithm() {
		return nil
	}
	return fmt.Errorf("layer %s unpacks to diffID %s, the image's config says %s: the image is damaged or forged, build it again: %w",
		want.Digest, l.DiffID, want.DiffID, errdefs.ErrDataLoss)
}

// tocLayer takes the index from the TOC in the blob. It returns nil when there
// is none that can be used: then the layer is read like any other.
func (n *Node) tocLayer(ctx context.Context, repo *registry.Repository, l image.Layer) *layerIndex {
	toc, ok := tocOf(l)
	if !ok || !repo.Ranged() {
		return nil
	}
	key := layerKey{l.Digest, toc}
	made, _, err := n.layers.do(ctx, key, func(ctx context.Context, _ *atomic.Int64) (*layerIndex, error) {
		if kept := n.keptLayer(key); kept != nil {
			return kept, nil
		}
		blob := &counted{Blob: repo.LayerBlob(l.Descriptor)}
		made, err := estargz.Open(ctx, blob, l.Descriptor, toc)
		if err != nil {
			return nil, err
		}
		return n.saveLayer(key, made, fromTOC, blob.bytes.Load())
	}, nil)
	if err != nil {
		n.log.Warn("the layer's TOC cannot be used, the whole layer is fetched", "layer", l.Digest, "error", err)
		return nil
	}
	return made
}

// buildLayer streams the whole blob once: into the store, and into an index.
// How many do so at a time is bounded for the node: each takes a core and the
// buffers of a stream.
func (n *Node) buildLayer(ctx context.Context, repo *registry.Repository, l image.Layer, bytes *atomic.Int64) (*layerIndex, error) {
	select {
	case n.building <- struct{}{}:
		defer func() { <-n.building }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	body, err := repo.Open(ctx, l.Descriptor)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	ingest, err := n.store.Ingest()
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	defer ingest.Abort() // after Commit it does nothing
	made, err := layer.Build(ctx, body, l.Descriptor, ingest, layer.Options{Progress: bytes.Store})
	if err != nil {
		return nil, err
	}
	if _, err := ingest.Commit(&made.Table); err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	return n.saveLayer(layerKey{blob: l.Digest}, made, fromBlob, l.Size)
}

// saveLayer keeps a layer index on disk, and what of it a bootstrap needs in
// memory.
func (n *Node) saveLayer(k layerKey, l *index.Layer, from string, fetched int64) (*layerIndex, error) {
	data, err := index.EncodeLayer(l)
	if err != nil {
		return nil, err
	}
	if err := n.files.write(n.layerPath(k), data); err != nil {
		return nil, fmt.Errorf("keep index of layer %s: %w", k.blob, err)
	}
	l.Access = index.Access{}
	return &layerIndex{key: k, layer: l, from: from, bytes: fetched}, nil
}

// counted counts what is asked of a blob.
type counted struct {
	layer.Blob
	bytes atomic.Int64
}

func (c *counted) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	c.bytes.Add(n)
	return c.Blob.ReadRange(ctx, off, n)
}

// outOfSpace says what to do about a full disk.
func outOfSpace(err error) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	return fmt.Errorf("%w: %w (make room in the node's root directory, or remove images)", err, errdefs.ErrResourceExhausted)
}
