package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sort"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// image is an open image, shared by its handles. All but refs is immutable.
type image struct {
	record   record
	boot     *os.File
	segments []*segment
	index    []index.Segment // as sources see the segments
	refs     int             // protected by Store.mu
	building chan struct{}   // holds the one right to materialise
}

// Image is one user's handle of an image: the flat EROFS file as an address
// space. Its methods may be called at the same time.
type Image struct {
	h     *handle
	image *image
	size  int64
}

// Manifest names the image.
func (i *Image) Manifest() digest.Digest { return i.image.record.Manifest }

// Size is the length of the image in bytes.
func (i *Image) Size() int64 { return i.size }

// Segments lists the image's segments with their tables, which the caller must
// not change.
func (i *Image) Segments() []index.Segment { return slices.Clone(i.image.index) }

// Present is how many bytes of the image can be read without a fetch. What no
// chunk covers counts; chunks that wait in memory do not.
func (i *Image) Present() int64 { return i.size - i.h.missing() }

// Complete says whether all bytes are local.
func (i *Image) Complete() bool { return i.h.missing() == 0 }

// ReadAt reads like [io.ReaderAt], waiting for what has to be fetched: it
// returns fewer bytes than asked only with an error, io.EOF at the end of the
// image. The error is ctx's own when ctx ends first, ErrUnavailable when no
// source could be reached, and ErrDataLoss when all gave wrong bytes; a later
// read tries again.
func (i *Image) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s at %d: %w", i.h.what, off, errdefs.ErrInvalidArgument)
	}
	n := int(min(int64(len(p)), max(i.size-off, 0)))
	for done := 0; done < n; {
		m, err := i.readPart(ctx, p[done:n], off+int64(done))
		if err != nil {
			return done, i.h.wrap(ctx, err)
		}
		done += m
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// readPart reads up to the end of the bootstrap or segment that off lies in.
func (i *Image) readPart(ctx context.Context, p []byte, off int64) (int, error) {
	if boot := i.image.record.BootSize; off < boot {
		p = p[:min(int64(len(p)), boot-off)]
		return i.image.boot.ReadAt(p, off)
	}
	v := i.h.viewAt(off)
	p = p[:min(int64(len(p)), v.desc.End()-off)]
	return len(p), v.readAt(ctx, p, off-v.desc.Off)
}

// Fill fetches all that is missing, in large runs, and lets demand reads go
// first. It fails with ErrFailedPrecondition when the store keeps nothing, with
// ErrResourceExhausted when the disk is full, and at the first chunk that no
// source can give.
func (i *Image) Fill(ctx context.Context) error { return i.h.fill(ctx) }

// Prefetch fetches what of [off, off+n) is missing and waits for it. Without
// Keep it does so for at most half of Config.Memory bytes, which wait for their
// reader there.
func (i *Image) Prefetch(ctx context.Context, off, n int64) error {
	if off < 0 || n < 0 {
		return fmt.Errorf("prefetch %d bytes at %d of %s: %w", n, off, i.h.what, errdefs.ErrInvalidArgument)
	}
	if !i.h.s.cfg.Keep {
		n = min(n, i.h.s.cfg.Memory/2)
	}
	for at, end := max(off, i.image.record.BootSize), min(n, i.size-min(off, i.size))+off; at < end; {
		v := i.h.viewAt(at)
		m := min(end, v.desc.End()) - at
		if err := v.prefetch(ctx, at-v.desc.Off, m); err != nil {
			return i.h.wrap(ctx, err)
		}
		at += m
	}
	return nil
}

// Close ends this handle's fetches and releases the image. It is idempotent.
func (i *Image) Close() error {
	i.h.close()
	return nil
}

// Segment is one user's handle of a segment without an image around it.
type Segment struct{ h *handle }

// Size is the length of the segment in bytes.
func (g *Segment) Size() int64 { return g.h.views[0].desc.Table.Size }

// Present is as for an Image.
func (g *Segment) Present() int64 { return g.Size() - g.h.missing() }

// Complete says whether all bytes are local.
func (g *Segment) Complete() bool { return g.h.missing() == 0 }

// ReadAt is as for an Image.
func (g *Segment) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s at %d: %w", g.h.what, off, errdefs.ErrInvalidArgument)
	}
	n := int(min(int64(len(p)), max(g.Size()-off, 0)))
	if n > 0 {
		if err := g.h.views[0].readAt(ctx, p[:n], off); err != nil {
			return 0, g.h.wrap(ctx, err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Fill is as for an Image.
func (g *Segment) Fill(ctx context.Context) error { return g.h.fill(ctx) }

// Close is as for an Image.
func (g *Segment) Close() error {
	g.h.close()
	return nil
}

// viewAt returns the view that the offset of the image lies in. Precondition:
// off is behind the bootstrap and before the end.
func (h *handle) viewAt(off int64) *view {
	return &h.views[sort.Search(len(h.views), func(k int) bool { return h.views[k].desc.End() > off })]
}

// missing is how many bytes have to be fetched.
func (h *handle) missing() int64 {
	n := int64(0)
	for k := range h.views {
		n += h.views[k].seg.missing.Load()
	}
	return n
}

// wrap adds to err what was read, but leaves the reader's own cancellation
// alone.
func (h *handle) wrap(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return ctx.Err()
	}
	return fmt.Errorf("read %s: %w", h.what, err)
}
