package layer

import (
	"context"
	"errors"
	"io"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// pieceRuns finds the data of a range in pieces of blobs (format Chunked).
type pieceRuns struct {
	ctx    context.Context
	r      *Reader
	worker *sched.Worker // who reads
	i      int           // next chunk
	off    int64         // where the range begins, in the segment
	end    int64         // and ends

	body io.ReadCloser // request in progress, nil if none
	blob uint16        // that it goes to
	pos  int64         // blob offset that body is at
	last int64         // blob offset where what was asked for ends

	unit    index.Piece      // the latest that was opened
	packed  io.LimitedReader // of body: its compressed bytes
	z       plain            // its plain bytes, nil if none is open
	inner   int64            // plain offset in it that z is at
	pending int64            // plain bytes of z that the stream still takes
}

func newPieceRuns(ctx context.Context, r *Reader, worker *sched.Worker, off, end int64) *pieceRuns {
	return &pieceRuns{ctx: ctx, r: r, worker: worker, i: r.layer.Table.Find(off), off: off, end: end}
}

func (p *pieceRuns) next(int64) (run, bool, error) {
	c, piece, ok := p.piece(p.i)
	if !ok {
		return run{}, false, nil
	}
	p.inner += p.pending
	p.pending = c.Len
	if err := p.seek(piece, c.Len); err != nil {
		return run{}, false, err
	}
	p.i++
	return run{c.Off, c.End(), p.z}, true, nil
}

// piece is chunk i and its piece, cut to the range. Of plain bytes nothing else
// is asked for.
func (p *pieceRuns) piece(i int) (index.Chunk, index.Piece, bool) {
	chunks := p.r.layer.Table.Chunks
	if i == len(chunks) || chunks[i].Off >= p.end {
		return index.Chunk{}, index.Piece{}, false
	}
	c, x := chunks[i], p.r.layer.Access.Pieces[i]
	end := min(p.end, c.End())
	from := max(p.off, c.Off)
	x.Inner += from - c.Off
	c.Off, c.Len = from, end-from
	if x.Codec == index.Stored && x.Inner <= x.Len-c.Len {
		x = index.Piece{Blob: x.Blob, Off: x.Off + x.Inner, Len: c.Len}
	}
	return c, x, true
}

// sameUnit says whether two pieces decompress to the same bytes.
func sameUnit(a, b index.Piece) bool {
	a.Inner, b.Inner = 0, 0
	return a == b
}

// seek makes z deliver the plain bytes of a piece from its inner offset on, of
// which n will be read.
func (p *pieceRuns) seek(x index.Piece, n int64) error {
	if p.z == nil || !sameUnit(x, p.unit) || x.Inner < p.inner {
		if err := p.open(x, n); err != nil {
			return err
		}
	}
	skip := x.Inner - p.inner
	p.inner = x.Inner
	return discard(p.ctx, p.z, skip)
}

// open starts a unit, with a new request if that in progress does not lead to
// it.
func (p *pieceRuns) open(x index.Piece, n int64) error {
	if err := p.closeUnit(); err != nil {
		return err
	}
	if p.body == nil || x.Blob != p.blob || x.Off < p.pos || x.Off+x.Len > p.last {
		if err := p.request(x); err != nil {
			return err
		}
	}
	if err := discard(p.ctx, p.body, x.Off-p.pos); err != nil {
		return err
	}
	p.pos = x.Off
	p.packed = io.LimitedReader{R: p.body, N: x.Len}
	p.unit, p.inner = x, 0
	var err error
	p.z, err = p.r.unpack(&p.packed, x, n)
	return err
}

// closeUnit gives back the decoder and notes how far it has read.
func (p *pieceRuns) closeUnit() error {
	if p.z == nil {
		return nil
	}
	p.pos += p.unit.Len - p.packed.N
	err := p.z.Close()
	p.z = nil
	return err
}

// request asks for the blob of a piece from there on, as far as the range has
// pieces that follow each other closely.
func (p *pieceRuns) request(x index.Piece) error {
	if err := p.closeBody(); err != nil {
		return err
	}
	end := x.Off
	for i := p.i; ; i++ {
		_, next, ok := p.piece(i)
		if !ok || next.Blob != x.Blob || next.Off < x.Off || next.Off-end > maxGap {
			break
		}
		end = max(end, next.Off+next.Len)
	}
	body, err := p.r.blob(x.Blob, p.worker).ReadRange(p.ctx, x.Off, end-x.Off)
	if err != nil {
		return err
	}
	p.body, p.blob, p.pos, p.last = body, x.Blob, x.Off, end
	return nil
}

func (p *pieceRuns) closeBody() error {
	if p.body == nil {
		return nil
	}
	err := p.body.Close()
	p.body = nil
	return err
}

// Close ends the request in progress.
func (p *pieceRuns) Close() error {
	return errors.Join(p.closeBody(), p.closeUnit())
}
