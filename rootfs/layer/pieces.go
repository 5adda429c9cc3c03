package layer

import (
	"context"
	"io"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
)

// pieceRuns finds the data of a range in gzip members (format Members).
type pieceRuns struct {
	ctx context.Context
	r   *Reader
	i   int   // next chunk
	end int64 // of the range, in the segment

	body io.ReadCloser // request in progress, nil if none
	pos  int64         // blob offset that body is at
	last int64         // blob offset where what was asked for ends

	member  io.LimitedReader // of body: the open member
	z       *gzip.Reader     // its plain bytes, nil if no member is open
	off     int64            // blob offset of the open member
	size    int64            // its length
	inner   int64            // plain offset in it that z is at
	pending int64            // plain bytes of z that the stream still takes
}

func newPieceRuns(ctx context.Context, r *Reader, off, end int64) *pieceRuns {
	return &pieceRuns{ctx: ctx, r: r, i: r.layer.Table.Find(off), end: end}
}

func (p *pieceRuns) next(off int64) (run, bool, error) {
	chunks := p.r.layer.Table.Chunks
	if p.i == len(chunks) || chunks[p.i].Off >= p.end {
		return run{}, false, nil
	}
	c, piece := chunks[p.i], p.r.layer.Access.Pieces[p.i]
	from, to := max(off, c.Off), min(p.end, c.End())
	if from >= to || piece.Off < 0 || piece.Len <= 0 || piece.Inner < 0 ||
		piece.Off > p.r.layer.BlobSize-piece.Len {
		return run{}, false, p.r.invalid("chunks are out of order")
	}
	p.inner += p.pending
	p.pending = to - from
	if err := p.seek(piece, piece.Inner+from-c.Off); err != nil {
		return run{}, false, err
	}
	p.i++
	return run{from, to, p.z}, true, nil
}

// seek makes z deliver the plain bytes of a member from offset inner on.
func (p *pieceRuns) seek(piece index.Piece, inner int64) error {
	if p.z == nil || piece.Off != p.off || inner < p.inner {
		if err := p.open(piece); err != nil {
			return err
		}
	}
	skip := inner - p.inner
	p.inner = inner
	return p.z.Discard(skip)
}

// open starts a member, with a new request if that in progress does not lead
// to it.
func (p *pieceRuns) open(piece index.Piece) error {
	if err := p.closeMember(); err != nil {
		return err
	}
	if p.body == nil || piece.Off < p.pos || piece.Off+piece.Len > p.last {
		if err := p.request(piece.Off); err != nil {
			return err
		}
	}
	if err := discard(p.body, piece.Off-p.pos); err != nil {
		return err
	}
	p.pos = piece.Off
	p.member = io.LimitedReader{R: p.body, N: piece.Len}
	p.z = p.r.pool.NewReader(&p.member)
	p.off, p.size, p.inner = piece.Off, piece.Len, 0
	return nil
}

// closeMember gives back the decoder and notes how far it has read.
func (p *pieceRuns) closeMember() error {
	if p.z == nil {
		return nil
	}
	p.pos += p.size - p.member.N
	err := p.z.Close()
	p.z = nil
	return err
}

// request asks for the blob from off on, as far as the range has members that
// follow each other closely.
func (p *pieceRuns) request(off int64) error {
	if err := p.closeBody(); err != nil {
		return err
	}
	chunks, pieces := p.r.layer.Table.Chunks, p.r.layer.Access.Pieces
	end := off
	for i := p.i; i < len(chunks) && chunks[i].Off < p.end; i++ {
		if x := pieces[i]; x.Off >= off && x.Off-end <= maxGap {
			end = max(end, x.Off+x.Len)
		} else {
			break
		}
	}
	body, err := p.r.blob.ReadRange(p.ctx, off, end-off)
	if err != nil {
		return err
	}
	p.body, p.pos, p.last = body, off, end
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
	err := p.closeMember()
	if bodyErr := p.closeBody(); err == nil {
		err = bodyErr
	}
	return err
}
