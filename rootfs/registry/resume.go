package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
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
	from     *Repository        // at the host that is read from
	trip     *trip              // of body's request
	cancel   context.CancelFunc // of body's request
	hedge    hedge
	piece    piece         // off moves with what was read
	body     io.ReadCloser // nil when the rest has to be asked for
	whole    bool          // body goes on to the end of the blob
	failures int           // since progress was made
	since    int64         // bytes read since the last failure
	err      error         // sticky
}

func newRangeReader(ctx context.Context, r *Repository, p piece) *rangeReader {
	rr := &rangeReader{ctx: ctx, repo: r, piece: p}
	rr.hedge.rr = rr
	return rr
}

// ask requests what is left.
func (rr *rangeReader) ask() error {
	return rr.repo.each(rr.ctx, CanPull, func(one *Repository) error {
		return one.retry(rr.ctx, func() error { return rr.askOne(one) })
	})
}

// askOne requests it of one host. The answer may be another host's in the end.
func (rr *rangeReader) askOne(one *Repository) error {
	ctx, cancel := context.WithCancel(rr.ctx)
	trip := &trip{hedge: &rr.hedge, avoid: -1}
	one.client.peers.get(one.host).request()
	rr.from, rr.whole = one, false
	rr.hedge.begin(&wait{from: one, trip: trip, piece: rr.piece, cancel: cancel})
	body, whole, err := one.ranged(withTrip(ctx, trip), rr.piece)
	second := rr.hedge.end(err == nil)
	if err == nil {
		rr.body, rr.whole, rr.trip, rr.cancel = body, whole, trip, cancel
		note(rr.ctx, one, rr.piece)
	} else {
		cancel()
	}
	if second != nil {
		return rr.takeOver(second)
	}
	return err
}

// takeOver goes on with the second request of a race, which the first one lost.
func (rr *rangeReader) takeOver(s *second) error {
	rr.drop()
	late := rr.from
	often := late.client.peers.get(late.host).lost(time.Since(s.began))
	if often && !late.last && s.from.host != late.host {
		late.giveUp(late.fault(rr.piece.object(), errdefs.ErrUnavailable, errLate))
	}
	rr.from, rr.body, rr.whole, rr.trip, rr.cancel = s.from, s.body, s.whole, s.trip, s.cancel
	note(rr.ctx, rr.from, rr.piece)
	if rr.piece.off == rr.piece.end {
		rr.whole = false // its body is not read, so its end says nothing
		return nil
	}
	// What the first one still brought, when both did at the same time.
	if _, err := io.CopyN(io.Discard, rr.body, rr.piece.off-s.off); err != nil {
		rr.drop()
		return rr.failed(noEOF(err))
	}
	return nil
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
	rr.hedge.begin(&wait{from: rr.from, trip: rr.trip, piece: rr.piece, cancel: rr.cancel})
	n, err := rr.body.Read(p)
	second := rr.hedge.end(n > 0)
	rr.advance(n)
	if second != nil {
		err = rr.takeOver(second)
	}
	switch {
	case rr.piece.off == rr.piece.end:
		return n, rr.finish()
	case err == nil || second != nil:
		return n, err
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
	rr.from.client.peers.get(rr.from.host).finished()
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
		rr.cancel()
	}
}

// Close ends the request. It must not run beside Read.
func (rr *rangeReader) Close() error {
	rr.hedge.close()
	rr.drop()
	if rr.err == nil {
		rr.err = errors.New("read of a closed range")
	}
	return nil
}
