package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
)

// progress is how many bytes a resumed range must have brought for its
// failures to be forgotten. It bounds the requests for n bytes by
// (n/progress+1)*(RetryMax+1).
const progress = 256 << 10

// rangeReader reads one piece and asks again for the rest of it when a body
// does not bring it all.
type rangeReader struct {
	ctx      context.Context // of the Range call: it covers the reading as well
	repo     *Repository
	from     *Repository   // at the host that is read from
	piece    piece         // off moves with what was read
	body     io.ReadCloser // nil when the rest has to be asked for
	whole    bool          // body goes on to the end of the blob
	failures int           // since progress was made
	since    int64         // bytes read since the last failure
	err      error         // sticky
}

// ask requests what is left.
func (rr *rangeReader) ask() error {
	return rr.repo.each(rr.ctx, CanPull, func(one *Repository) error {
		rr.from = one
		return one.retry(rr.ctx, func() (err error) {
			rr.body, rr.whole, err = one.ranged(rr.ctx, rr.piece)
			return err
		})
	})
}

// Read implements io.Reader.
func (rr *rangeReader) Read(p []byte) (int, error) {
	if rr.err != nil {
		return 0, rr.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	for rr.piece.off < rr.piece.end {
		n, err := rr.readBody(p)
		if n > 0 {
			return n, nil
		}
		if err != nil {
			rr.err = err
			return 0, err
		}
	}
	rr.err = io.EOF
	return 0, rr.err
}

// readBody reads once. Neither bytes nor an error means that a lost body has
// been replaced.
func (rr *rangeReader) readBody(p []byte) (int, error) {
	if rr.body == nil {
		return 0, rr.ask()
	}
	p = p[:min(int64(len(p)), rr.piece.end-rr.piece.off)]
	n, err := rr.body.Read(p)
	rr.advance(n)
	if rr.piece.off == rr.piece.end {
		return n, rr.finish()
	}
	if err == nil {
		return n, nil
	}
	rr.drop()
	if n > 0 {
		// These bytes are good; the next call sees to the rest.
		return n, nil
	}
	return 0, rr.failed(noEOF(err))
}

func (rr *rangeReader) advance(n int) {
	rr.piece.off += int64(n)
	rr.since += int64(n)
	if rr.since >= progress {
		rr.failures = 0
	}
}

// failed waits before the rest is asked for again; after too many failures it
// returns an error. When a mirror failed, the next host goes on at once.
func (rr *rangeReader) failed(err error) error {
	rr.since = 0
	if errors.Is(err, errStalled) {
		err = fmt.Errorf("%w (%s)", errStalled, rr.repo.client.cfg.Stall)
	}
	e := rr.from.bodyError(rr.piece.object(), err)
	if !rr.from.last && rr.ctx.Err() == nil {
		rr.from.giveUp(e)
		return nil
	}
	if !rr.from.again(rr.ctx, rr.failures, e) {
		return cmp.Or(rr.ctx.Err(), e)
	}
	rr.failures++
	return nil
}

// finish ends the body when all was read, so that its connection can serve the
// next range, and checks the size of a blob that came whole.
func (rr *rangeReader) finish() error {
	if rr.whole && rr.piece.end == rr.piece.size {
		if n, _ := io.CopyN(io.Discard, rr.body, 1); n > 0 { // an error here is the expected end
			rr.err = rr.from.dataLoss(rr.piece.object(), "the registry has more than the %d bytes that the descriptor says", rr.piece.size)
		}
	}
	rr.drop()
	return rr.err
}

func (rr *rangeReader) drop() {
	if rr.body != nil {
		_ = rr.body.Close() // nothing was written, and a resumed body has failed already
		rr.body = nil
	}
}

// Close ends the request. It must not run beside Read.
func (rr *rangeReader) Close() error {
	rr.drop()
	if rr.err == nil {
		rr.err = errors.New("read of a closed range")
	}
	return nil
}
