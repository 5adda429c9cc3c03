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
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/blobs"
	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// maxLayerFile bounds an encoded layer index in bytes.
const maxLayerFile = 4 << 30

// layerKey names a layer index: that of a blob, and of what describes the layer
// (formats.Way.By), empty when it was built from the whole blob.
type layerKey struct{ blob, by digest.Digest }

func (n *Node) layerPath(k layerKey) string {
	path := n.files.layer(k.blob)
	if k.by != "" {
		path += "." + k.by.Encoded()
	}
	return path
}

// Where an index came from, beside the ways of package formats.
const (
	fromNode = "node"
	fromBlob = "built"
)

// layerIndex is a layer index as far as a bootstrap needs it: without Access.
type layerIndex struct {
	key   layerKey
	layer *index.Layer
	from  string
	bytes int64 // of the blob that were fetched for it
	// published says that neither the blob nor the image's manifest vouches for
	// the index, but whoever published it in the image's repository.
	published bool
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

// keptLayer returns the layer index of a key if the node has it.
func (n *Node) keptLayer(k layerKey) *layerIndex {
	l, err := n.readLayer(k)
	if err != nil {
		if !errdefs.IsNotFound(err) {
			n.log.Warn("a layer index is damaged and will be made again", "layer", k.blob, "error", err)
		}
		return nil
	}
	l.Access, l.Skeleton = index.Access{}, nil
	return &layerIndex{key: k, layer: l, from: fromNode}
}

// hasLayer says whether the node has the index of a layer that was built from
// its blob, without reading it.
func (n *Node) hasLayer(blob digest.Digest) bool {
	_, err := os.Stat(n.layerPath(layerKey{blob: blob}))
	return err == nil
}

// layer finds or makes the index of one layer. Whoever else needs the same
// layer at this time shares the work; watch gets its counter of bytes. An index
// that was built from the blob speaks for the blob whatever else does.
func (n *Node) layer(ctx context.Context, repo *registry.Repository, f *formats.Finder, l formats.Layer, watch func(*atomic.Int64)) (*layerIndex, error) {
	if l.Whole {
		if kept := n.keptLayer(layerKey{blob: l.Digest}); kept != nil {
			return kept, l.Check(kept.layer)
		}
	}
	var errs []error
	for _, w := range f.Ways(l) {
		if l.Whole && !repo.Ranged() || n.isForged(layerKey{l.Digest, w.By}) {
			continue
		}
		made, err := n.wayLayer(ctx, l, w)
		if err == nil {
			err = l.Check(made.layer)
		}
		if err == nil || ctx.Err() != nil {
			return made, err
		}
		n.log.Warn("a layer's index cannot be used, another way is taken", "layer", l.Digest, "from", w.From, "by", w.By, "error", err)
		errs = append(errs, err)
	}
	if !l.Whole {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, errors.Join(errs...))
	}
	return n.wholeLayer(ctx, repo, l, watch)
}

// wayLayer has the index of a layer in one of the ways to it.
func (n *Node) wayLayer(ctx context.Context, l formats.Layer, w formats.Way) (*layerIndex, error) {
	key := layerKey{l.Digest, w.By}
	open := func(ctx context.Context, _ *atomic.Int64) (*layerIndex, error) {
		if kept := n.keptLayer(key); kept != nil && kept.layer.BlobSize == l.Size {
			return kept, nil
		}
		made, fetched, err := w.Open(ctx)
		if err != nil {
			return nil, err
		}
		return n.saveLayer(key, made, w.From, fetched)
	}
	made, shared, err := n.layers.do(ctx, key, open, nil)
	if shared && (err != nil || made.layer.BlobSize != l.Size) && ctx.Err() == nil {
		// It was opened for another image, whose repository may say other things.
		made, _, err = n.layers.do(ctx, key, open, nil)
	}
	if err != nil {
		return nil, err
	}
	own := *made
	own.published = w.From != formats.FromTOC && w.From != formats.FromNydus
	return &own, nil
}

// wholeLayer has the index of a layer built from its blob.
func (n *Node) wholeLayer(ctx context.Context, repo *registry.Repository, l formats.Layer, watch func(*atomic.Int64)) (*layerIndex, error) {
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
	return made, l.Check(made.layer)
}

// buildLayer streams the whole blob once: into the store, and into an index.
func (n *Node) buildLayer(ctx context.Context, repo *registry.Repository, l formats.Layer, bytes *atomic.Int64) (*layerIndex, error) {
	leave, err := n.building.enter(ctx, repo.Host())
	if err != nil {
		return nil, err
	}
	defer leave()
	for {
		trailed, trail := registry.WithTrail(ctx)
		made, err := n.streamLayer(trailed, repo, l, bytes)
		if again := errdefs.IsDataLoss(err) && (trail.Blame(err) || errors.Is(err, blobs.ErrAgain)); !again {
			return made, err // a mirror that is blamed is not asked again
		}
	}
}

func (n *Node) streamLayer(ctx context.Context, repo *registry.Repository, l formats.Layer, bytes *atomic.Int64) (*layerIndex, error) {
	body, err := n.whole(ctx, repo, l.Descriptor)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	ingest, err := n.store.Ingest(ctx)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	defer ingest.Abort() // after Commit it does nothing
	made, err := layer.Build(ctx, body, l.Descriptor, ingest, layer.Options{Progress: bytes.Store, CPU: n.cfg.Sched.CPU()})
	if err != nil {
		return nil, err
	}
	if _, err := ingest.Commit(&made.Table); err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	return n.saveLayer(layerKey{blob: l.Digest}, made, fromBlob, l.Size)
}

// whole reads a blob in order.
func (n *Node) whole(ctx context.Context, repo *registry.Repository, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if n.cfg.Mirrored {
		return n.blobs.Open(ctx, repo, desc, 0, desc.Size)
	}
	return repo.Open(ctx, desc)
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
	l.Access, l.Skeleton = index.Access{}, nil
	return &layerIndex{key: k, layer: l, from: from, bytes: fetched}, nil
}

// outOfSpace says what to do about a full disk.
func outOfSpace(err error) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	return fmt.Errorf("%w: %w (make room in the node's root directory, or remove images)", err, errdefs.ErrResourceExhausted)
}
