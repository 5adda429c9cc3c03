package node

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// audit is told of segments that have become complete. That each of their chunks
// has the digest of its table says that a layer is what its index describes; now
// it can be seen whether it is also what the image's config describes. One that
// is not is poisoned: nothing of it is read any more.
func (n *Node) audit(id index.ID) {
	for _, k := range n.described(id) {
		err := n.auditLayer(n.ctx, id, k)
		if errdefs.IsDataLoss(err) {
			err = n.store.Poison(id, err)
		}
		if err != nil && n.ctx.Err() == nil {
			n.log.Warn("the diffID of a complete layer could not be checked", "layer", k.blob, "segment", id, "error", err)
		}
	}
}

// described are the layer indexes of a segment that somebody has published. One
// that the node built has been checked then.
func (n *Node) described(id index.ID) []layerKey {
	n.mu.Lock()
	defer n.mu.Unlock()
	var keys []layerKey
	for _, r := range n.images {
		for _, s := range r.Segments {
			if s.ID == id {
				keys = append(keys, r.published(s)...)
			}
		}
	}
	return keys
}

func (r *record) published(s segmentRecord) []layerKey {
	for _, l := range r.Layers {
		if l.Blob == s.Layer && l.By != "" {
			return []layerKey{l.key()}
		}
	}
	return nil
}

// auditLayer is of class DataLoss when the segment does not make the tar of the
// layer. An index without skeleton cannot be held against its diffID.
func (n *Node) auditLayer(ctx context.Context, id index.ID, k layerKey) error {
	l, err := n.readLayer(k)
	if err != nil || len(l.Skeleton) == 0 || l.DiffID == "" {
		return err
	}
	seg, err := n.store.OpenSegment(ctx, &index.Segment{ID: id, Layer: k.blob, Table: &l.Table}, nil)
	if err != nil {
		return err
	}
	got, err := layer.DiffID(ctx, l, segmentAt{ctx, seg})
	if closeErr := seg.Close(); err == nil {
		err = closeErr
	}
	if err == nil && got != l.DiffID {
		err = fmt.Errorf("layer %s unpacks to diffID %s, its index and the image's config say %s: the index is damaged or forged, publish it again: %w",
			k.blob, got, l.DiffID, errdefs.ErrDataLoss)
	}
	return err
}

// segmentAt reads a complete segment.
type segmentAt struct {
	ctx context.Context
	seg *store.Segment
}

var _ io.ReaderAt = segmentAt{}

// ReadAt implements io.ReaderAt.
func (s segmentAt) ReadAt(p []byte, off int64) (int, error) { return s.seg.ReadAt(s.ctx, p, off) }
