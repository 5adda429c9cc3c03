package layer

import (
	"context"
	"errors"
	"io"
	"sort"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// extentRuns finds the data of a range in a tar stream (formats Tar, Gzip and
// Zstd).
type extentRuns struct {
	ctx    context.Context
	r      *Reader
	worker *sched.Worker // who reads
	i      int           // next extent
	end    int64         // of the range, in the segment

	body  io.Closer // request in progress, nil if none
	plain io.Reader // what body is or inflates to
	at    int64     // tar offset that plain is at
	until int64     // tar offset where what was asked for ends
}

func newExtentRuns(ctx context.Context, r *Reader, worker *sched.Worker, off, end int64) *extentRuns {
	ext := r.layer.Access.Extents
	i := sort.Search(len(ext), func(i int) bool { return ext[i].Seg+ext[i].Len > off })
	return &extentRuns{ctx: ctx, r: r, worker: worker, i: i, end: end}
}

// cut is an extent cut to [off, e.end).
func (e *extentRuns) cut(i int, off int64) (index.Extent, bool) {
	ext := e.r.layer.Access.Extents
	if i == len(ext) || ext[i].Seg >= e.end {
		return index.Extent{}, false
	}
	x := ext[i]
	skip := max(0, off-x.Seg)
	x = index.Extent{Seg: x.Seg + skip, Tar: x.Tar + skip, Len: x.Len - skip}
	x.Len = min(x.Len, e.end-x.Seg)
	return x, true
}

func (e *extentRuns) next(off int64) (run, bool, error) {
	x, ok := e.cut(e.i, off)
	if !ok {
		return run{}, false, nil
	}
	if x.Len <= 0 || x.Tar < 0 || x.Seg < off {
		return run{}, false, e.r.invalid("extents are out of order")
	}
	if err := e.seek(x, off); err != nil {
		return run{}, false, err
	}
	e.i++
	e.at += x.Len // the stream takes all of it before it asks again
	return run{x.Seg, x.Seg + x.Len, e.plain}, true, nil
}

// seek makes plain deliver the tar stream from x on.
func (e *extentRuns) seek(x index.Extent, off int64) error {
	if e.body != nil && x.Tar >= e.at && x.Tar+x.Len <= e.until {
		err := discard(e.ctx, e.plain, x.Tar-e.at)
		e.at = x.Tar
		return err
	}
	if err := e.Close(); err != nil {
		return err
	}
	e.at, e.until = x.Tar, e.group(off)
	if e.r.layer.Access.Format != index.Tar {
		return e.openPacked()
	}
	body, err := e.r.blob(0, e.worker).ReadRange(e.ctx, e.at, e.until-e.at)
	if err != nil {
		return err
	}
	e.body, e.plain = body, body
	return nil
}

// group is the tar offset up to which extents follow closely enough to be had
// with one request.
func (e *extentRuns) group(off int64) int64 {
	x, _ := e.cut(e.i, off)
	end := x.Tar + x.Len
	for i := e.i + 1; ; i++ {
		x, ok := e.cut(i, off)
		if !ok || x.Tar < end || x.Tar-end > maxGap {
			return end
		}
		end = x.Tar + x.Len
	}
}

// openPacked asks for a compressed blob from the checkpoint before e.at to the
// first one that is not before e.until.
func (e *extentRuns) openPacked() error {
	points := e.r.layer.Access.Checkpoints
	first := sort.Search(len(points), func(i int) bool { return points[i].Out > e.at }) - 1
	if first < 0 {
		return e.r.invalid("no checkpoint before the data")
	}
	c := points[first]
	start, end := c.Bit/8, e.r.layer.BlobSize
	if last := sort.Search(len(points), func(i int) bool { return points[i].Out >= e.until }); last < len(points) {
		end = (points[last].Bit + 7) / 8
	}
	if start < 0 || end <= start {
		return e.r.invalid("checkpoints are out of order")
	}
	body, err := e.r.blob(0, e.worker).ReadRange(e.ctx, start, end-start)
	if err != nil {
		return err
	}
	var z plain
	if e.r.layer.Access.Format == index.Zstd {
		z = zstdPool.Resume(body, c)
	} else {
		z = gzipPool.Resume(body, c)
	}
	e.body, e.plain = &unpacked{body, z}, z
	return discard(e.ctx, z, e.at-c.Out)
}

// Close ends the request in progress.
func (e *extentRuns) Close() error {
	if e.body == nil {
		return nil
	}
	err := e.body.Close()
	e.body, e.plain = nil, nil
	return err
}

// unpacked closes a request and gives back its decoder.
type unpacked struct {
	body io.Closer
	z    plain
}

func (u *unpacked) Close() error {
	return errors.Join(u.body.Close(), u.z.Close())
}
