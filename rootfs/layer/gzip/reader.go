package gzip

import (
	"errors"
	"io"
	"sync"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Pool keeps decoders for reuse: one holds some 200 KiB, more than most reads
// ask for. The zero value is ready.
type Pool struct{ free sync.Pool }

func (p *Pool) get() *inflater {
	if z, ok := p.free.Get().(*inflater); ok {
		return z
	}
	return new(inflater)
}

// Reader is the plain bytes of a gzip blob, or of a part of it.
type Reader struct {
	pool *Pool
	z    *inflater
	buf  []byte // decoded and not read yet; part of z.out
	sum  sum
	err  error // sticky

	inside bool  // in a member; otherwise a header comes next
	seen   bool  // a member has begun
	span   int64 // between checkpoints, plain bytes; 0 for none
	points []index.Checkpoint
}

// NewReader reads the blob src from its start: at least one member, then
// nothing else. Checksums and sizes of members are checked.
func (p *Pool) NewReader(src io.Reader) *Reader {
	r := &Reader{pool: p, z: p.get()}
	r.z.in.reset(src, 0)
	r.z.start(nil, 0)
	return r
}

// Resume reads on from a checkpoint, where src is the blob from byte c.Bit/8
// on. The first byte read is plain byte c.Out. Src may end as soon as the
// bytes that will be read are complete: before the next checkpoint, for
// instance. The checksum of the member that c is in is not checked.
func (p *Pool) Resume(src io.Reader, c index.Checkpoint) *Reader {
	r := &Reader{pool: p, z: p.get(), inside: true, seen: true}
	r.z.in.reset(src, c.Bit/8)
	r.z.start(c.Window[max(0, len(c.Window)-windowSize):], c.Out)
	if skip := uint(c.Bit & 7); skip > 0 {
		_, r.err = r.z.in.take(skip)
	}
	return r
}

// Record makes the reader keep a checkpoint about every span plain bytes. It
// must be called before the first Read.
func (r *Reader) Record(span int64) { r.span = span }

// Checkpoints are those recorded so far, by rising position. The first one is
// at the first block of the blob.
func (r *Reader) Checkpoints() []index.Checkpoint { return r.points }

// Close gives the decoder back; reading has an error from then on.
func (r *Reader) Close() error {
	if r.z != nil {
		r.z.in.src = nil
		r.pool.free.Put(r.z)
	}
	r.z, r.buf, r.err = nil, nil, errors.New("read of a closed gzip reader")
	return nil
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.decode(len(p)); err != nil {
		return 0, err
	}
	n := copy(p, r.buf)
	r.buf = r.buf[n:]
	return n, nil
}

// Discard skips n plain bytes. It costs less than reading them.
func (r *Reader) Discard(n int64) error {
	for n > 0 {
		if err := r.decode(int(min(n, outputSize))); err != nil {
			if errors.Is(err, io.EOF) {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		k := min(n, int64(len(r.buf)))
		r.buf = r.buf[k:]
		n -= k
	}
	return nil
}

// decode makes sure that buf is not empty, decoding about want bytes.
func (r *Reader) decode(want int) error {
	for len(r.buf) == 0 {
		if r.err != nil {
			return r.err
		}
		r.err = r.step(want)
	}
	return nil
}

// step goes on by a header, a trailer or a piece of data.
func (r *Reader) step(want int) error {
	z := r.z
	switch {
	case !r.inside:
		return r.begin()
	case z.state == atEnd:
		r.inside = false
		return memberTrailer(&z.in, &r.sum)
	case z.state == atBlock:
		r.mark()
	}
	z.slide()
	b, err := z.next(want)
	r.sum.add(b)
	r.buf = b
	return err
}

// begin reads the header of the next member.
func (r *Reader) begin() error {
	err := memberHeader(&r.z.in)
	if errors.Is(err, io.EOF) && !r.seen {
		return io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	r.z.restart()
	r.sum = sum{whole: true}
	r.inside, r.seen = true, true
	return nil
}

// memberShare is how much earlier a checkpoint is taken at the start of a
// member than elsewhere: it has no window and so costs next to nothing.
const memberShare = 8

// mark records a checkpoint when it is time for one.
func (r *Reader) mark() {
	if r.span == 0 {
		return
	}
	window := r.z.window()
	if n := len(r.points); n > 0 {
		gap := r.z.total - r.points[n-1].Out
		if gap == 0 || gap < r.span && (len(window) > 0 || gap < r.span/memberShare) {
			return
		}
	}
	c := index.Checkpoint{Bit: r.z.in.bit(), Out: r.z.total}
	if len(window) > 0 {
		c.Window = append([]byte(nil), window...)
	}
	r.points = append(r.points, c)
	if len(r.points) >= maxPoints {
		r.thin()
	}
}

// maxPoints bounds the windows of one blob to 128 MiB: a small blob of
// many zeros, which is a large file, would have any number of checkpoints.
const maxPoints = 4096

// thin drops every second checkpoint and takes further ones at twice the
// distance. The first, from which everything can be reached, stays.
func (r *Reader) thin() {
	kept := r.points[:0]
	for i := 0; i < len(r.points); i += 2 {
		kept = append(kept, r.points[i])
	}
	clear(r.points[len(kept):])
	r.points, r.span = kept, 2*r.span
}
