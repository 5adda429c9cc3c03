package layer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// maxSkeleton bounds a skeleton in bytes. A file takes some 800 of them, or
// twice as much with extended headers.
const maxSkeleton = 1 << 30

// skeleton reads a tar stream and keeps its bytes, but for those of files.
type skeleton struct {
	r    io.Reader
	file bool // what is being read now are the bytes of a file
	kept []byte
	over bool // there are too many to keep
}

// Read implements io.Reader.
func (s *skeleton) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if s.file || s.over {
		return n, err
	}
	if len(s.kept)+n > maxSkeleton {
		s.kept, s.over = nil, true
		return n, err
	}
	s.kept = append(s.kept, p[:n]...)
	return n, err
}

// beside is a segment that lets a skeleton know which bytes it takes.
type beside struct {
	tarball.Segment
	skeleton *skeleton
}

// ReadFrom implements tarball.Segment.
func (b beside) ReadFrom(r io.Reader) (int64, error) {
	b.skeleton.file = true
	defer func() { b.skeleton.file = false }()
	return b.Segment.ReadFrom(r)
}

// DiffID makes the uncompressed tar of a layer again, out of its skeleton and
// its segment, and returns its digest, which should be l.DiffID. Errors are
// those of WriteTar.
func DiffID(ctx context.Context, l *index.Layer, segment io.ReaderAt) (digest.Digest, error) {
	algorithm := digest.Canonical
	if l.DiffID != "" {
		algorithm = l.DiffID.Algorithm()
	}
	sum := algorithm.Hash()
	if err := WriteTar(ctx, l, segment, sum); err != nil {
		return "", err
	}
	return digest.NewDigest(algorithm, sum), nil
}

// WriteTar writes the uncompressed tar of a layer, made again out of its
// skeleton and its segment.
//
// Errors: ErrNotFound if the layer has no skeleton, ErrInvalidArgument if it is
// not that of the layer; those of segment, w and ctx as they are.
func WriteTar(ctx context.Context, l *index.Layer, segment io.ReaderAt, w io.Writer) error {
	if len(l.Skeleton) == 0 {
		return fmt.Errorf("layer %s has no skeleton: %w", l.Blob, errdefs.ErrNotFound)
	}
	r := rebuilder{ctx: ctx, segment: segment, skeleton: l.Skeleton, w: w, buf: make([]byte, index.UnitSize)}
	if err := r.stream(l.Access.Extents); err != nil {
		return fmt.Errorf("tar of layer %s: %w", l.Blob, err)
	}
	return nil
}

// rebuilder puts a tar stream together.
type rebuilder struct {
	ctx      context.Context
	segment  io.ReaderAt
	skeleton []byte // what is left of it
	pos      int64  // in the stream
	w        io.Writer
	buf      []byte
}

// stream writes all of it.
func (r *rebuilder) stream(extents []index.Extent) error {
	byTar := func(a, b index.Extent) int { return cmp.Compare(a.Tar, b.Tar) }
	if !slices.IsSortedFunc(extents, byTar) {
		extents = slices.SortedFunc(slices.Values(extents), byTar)
	}
	for _, x := range extents {
		if err := r.extent(x); err != nil {
			return err
		}
	}
	_, err := r.w.Write(r.skeleton)
	return err
}

// extent writes what comes before an extent, and the extent.
func (r *rebuilder) extent(x index.Extent) error {
	before := x.Tar - r.pos
	if before < 0 || before > int64(len(r.skeleton)) {
		return fmt.Errorf("skeleton does not reach from byte %d to %d: %w", r.pos, x.Tar, errdefs.ErrInvalidArgument)
	}
	if _, err := r.w.Write(r.skeleton[:before]); err != nil {
		return err
	}
	r.skeleton, r.pos = r.skeleton[before:], x.Tar+x.Len
	for x.Len > 0 {
		if r.ctx.Err() != nil {
			return context.Cause(r.ctx)
		}
		b := r.buf[:min(x.Len, int64(len(r.buf)))]
		if n, err := r.segment.ReadAt(b, x.Seg); n < len(b) {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if _, err := r.w.Write(b); err != nil {
			return err
		}
		x.Seg += int64(len(b))
		x.Len -= int64(len(b))
	}
	return nil
}
