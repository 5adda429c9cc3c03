package layer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash"
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
// its segment, and returns its digest, which should be l.DiffID.
//
// Errors: ErrNotFound if the layer has no skeleton, ErrInvalidArgument if it is
// not that of the layer; those of segment and ctx as they are.
func DiffID(ctx context.Context, l *index.Layer, segment io.ReaderAt) (digest.Digest, error) {
	if len(l.Skeleton) == 0 {
		return "", fmt.Errorf("layer %s has no skeleton: %w", l.Blob, errdefs.ErrNotFound)
	}
	algorithm := digest.Canonical
	if l.DiffID != "" {
		algorithm = l.DiffID.Algorithm()
	}
	r := rebuilder{ctx: ctx, segment: segment, skeleton: l.Skeleton, sum: algorithm.Hash(), buf: make([]byte, index.UnitSize)}
	if err := r.stream(l.Access.Extents); err != nil {
		return "", fmt.Errorf("tar of layer %s: %w", l.Blob, err)
	}
	return digest.NewDigest(algorithm, r.sum), nil
}

// rebuilder hashes a tar stream that it puts together.
type rebuilder struct {
	ctx      context.Context
	segment  io.ReaderAt
	skeleton []byte // what is left of it
	pos      int64  // in the stream
	sum      hash.Hash
	buf      []byte
}

// stream hashes all of it.
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
	r.sum.Write(r.skeleton)
	return nil
}

// extent hashes what comes before an extent, and the extent.
func (r *rebuilder) extent(x index.Extent) error {
	before := x.Tar - r.pos
	if before < 0 || before > int64(len(r.skeleton)) {
		return fmt.Errorf("skeleton does not reach from byte %d to %d: %w", r.pos, x.Tar, errdefs.ErrInvalidArgument)
	}
	r.sum.Write(r.skeleton[:before])
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
		r.sum.Write(b)
		x.Seg += int64(len(b))
		x.Len -= int64(len(b))
	}
	return nil
}
