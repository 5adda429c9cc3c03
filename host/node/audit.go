package node

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"reflect"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// audit is told of segments that have become complete. That each of their chunks
// has the digest of its table says that a layer is what its index describes; now
// it can be seen whether it is also what the image's config describes: whether
// the tar that it makes has the diffID, and that tar the entries of the index.
// Images that use an index which was found forged are not served any more.
func (n *Node) audit(id index.ID) {
	for k := range n.described(id) {
		n.auditOne(id, k)
	}
}

// auditKept audits the published layers of a new image that are complete
// already.
func (n *Node) auditKept(r *record) {
	for _, s := range r.Segments {
		k, ok := r.published(s)
		if !ok {
			continue
		}
		n.background.Go(func() { n.auditOne(s.ID, k) })
	}
}

func (n *Node) auditOne(id index.ID, k layerKey) {
	work := sched.NewWork(sched.Standing{Flow: n.cfg.Sched.Flow("", "audit"), Rank: sched.Background})
	ctx := sched.With(n.ctx, work)
	leave, err := n.building.enter(ctx, "") // it costs as much as building a layer
	if err != nil {
		return
	}
	defer leave()
	err = n.auditLayer(ctx, id, k)
	switch {
	case n.ctx.Err() != nil || err == nil:
	case errdefs.IsDataLoss(err):
		n.log.Error("a published index is forged or damaged; images that use it are not served", "layer", k.blob, "by", k.by, "error", err)
		n.condemn(k, err)
	default:
		n.log.Warn("the diffID of a complete layer could not be checked", "layer", k.blob, "segment", id, "error", err)
	}
}

// condemn makes images that use an index unreadable, and ends what is shared of
// them.
func (n *Node) condemn(k layerKey, reason error) {
	for _, d := range n.markForged(k, reason) {
		n.store.EndShares(d)
	}
}

// markForged marks the images that use an index, so that they are gone after a
// restart, and returns them.
func (n *Node) markForged(k layerKey, reason error) (images []digest.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forged[k] = reason
	n.anyForged.Store(true)
	for d, r := range n.images {
		if !slices.Contains(r.Layers, layerRecord{k.blob, k.by}) {
			continue
		}
		images = append(images, d)
		if err := n.files.write(filepath.Join(n.files.image(d), forgedFile), []byte(reason.Error())); err != nil {
			n.log.Warn("an image with a forged index could not be marked; it is audited again when it is prepared", "manifest", d, "error", err)
		}
	}
	return images
}

// described are the layer indexes of a segment that somebody has published. One
// that the node built has been checked then.
func (n *Node) described(id index.ID) map[layerKey]bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	keys := map[layerKey]bool{}
	for _, r := range n.images {
		for _, s := range r.Segments {
			if k, ok := r.published(s); ok && s.ID == id {
				keys[k] = true
			}
		}
	}
	return keys
}

func (r *record) published(s segmentRecord) (layerKey, bool) {
	for _, l := range r.Layers {
		if l.Blob == s.Layer && l.By != "" {
			return l.key(), true
		}
	}
	return layerKey{}, false
}

// isForged says whether an index was found forged.
func (n *Node) isForged(k layerKey) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.forged[k] != nil
}

// forgedIn is the error of an image that uses a forged index.
func (n *Node) forgedIn(r *record) error {
	if !n.anyForged.Load() { // asked at every read
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range r.Layers {
		if err := n.forged[l.key()]; err != nil {
			return err
		}
	}
	return nil
}

// auditLayer is of class DataLoss when a complete segment does not make the tar
// of the layer, or the tar does not have the entries of the index. An index
// without skeleton (of a lazy format) cannot be held against its diffID.
func (n *Node) auditLayer(ctx context.Context, id index.ID, k layerKey) error {
	l, err := n.readLayer(k)
	if err != nil || len(l.Skeleton) == 0 || l.DiffID == "" {
		return err
	}
	seg, err := n.store.OpenSegment(ctx, &index.Segment{ID: id, Layer: k.blob, Table: &l.Table}, nil)
	if err != nil {
		return err
	}
	if seg.Complete() {
		err = auditSegment(ctx, n.cfg.Sched.CPU(), l, segmentAt{ctx, seg})
	}
	if closeErr := seg.Close(); err == nil {
		err = closeErr
	}
	return err
}

// auditSegment makes the tar again and reads it like any other.
func auditSegment(ctx context.Context, cpu *sched.Slots, l *index.Layer, segment io.ReaderAt) error {
	size := int64(len(l.Skeleton))
	for _, x := range l.Access.Extents {
		size += x.Len
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() { // ends with r
		defer close(done)
		w.CloseWithError(layer.WriteTar(ctx, l, segment, w))
	}()
	made, err := layer.Build(ctx, r, layer.Descriptor{Digest: l.DiffID, Size: size}, layer.Discard, layer.Options{CPU: cpu})
	r.CloseWithError(io.ErrClosedPipe)
	<-done
	switch {
	case errdefs.IsDataLoss(err) || errdefs.IsInvalidArgument(err):
		return fmt.Errorf("layer %s does not unpack to diffID %s, as its index and the image's config say (%s); publish the index again: %w",
			l.Blob, l.DiffID, err.Error(), errdefs.ErrDataLoss)
	case err != nil:
		return err
	case !sameEntries(made.Entries, l.Entries):
		return fmt.Errorf("layer %s has other files than its index says; publish the index again: %w", l.Blob, errdefs.ErrDataLoss)
	}
	return nil
}

func sameEntries(a, b []index.Entry) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		x, y := a[i], b[i]
		if len(x.Xattrs) == 0 && len(y.Xattrs) == 0 {
			x.Xattrs, y.Xattrs = nil, nil
		}
		if !reflect.DeepEqual(x, y) {
			return false
		}
	}
	return true
}

// segmentAt reads a complete segment.
type segmentAt struct {
	ctx context.Context
	seg *store.Segment
}

var _ io.ReaderAt = segmentAt{}

// ReadAt implements io.ReaderAt.
func (s segmentAt) ReadAt(p []byte, off int64) (int, error) { return s.seg.ReadAt(s.ctx, p, off) }
