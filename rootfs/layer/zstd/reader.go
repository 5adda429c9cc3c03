package zstd

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Pool keeps decoders for reuse. The zero value is ready.
type Pool struct{ free sync.Pool }

// maxPooled is the largest window of frames whose decoder is kept, in bytes:
// what the usual levels have. A decoder keeps the memory of the largest.
const maxPooled = 8 << 20

// decoder is what decodes frames, and what splits the blob into them.
type decoder struct {
	z      *zstd.Decoder
	frames frames
	window uint64 // the largest so far, in bytes
}

// newDecoder makes a decoder that works in the goroutine which reads: computing has
// turns, and when a whole layer is read, hashing what comes out takes as long.
func newDecoder() (*decoder, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderMaxWindow(MaxWindow), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	return &decoder{z: z}, nil
}

// Reader is the plain bytes of a zstd blob, or of a part of it.
type Reader struct {
	pool  *Pool // nil: the decoder is not kept
	d     *decoder
	total int64 // plain bytes decoded so far, of the whole blob
	err   error // sticky

	inside bool  // in a frame; otherwise the next one comes
	start  int64 // of that frame in the blob
	span   int64 // between checkpoints, plain bytes; 0 for none
	points []index.Checkpoint
}

// NewReader reads the whole blob src: at least one frame, then nothing else.
// It is to be closed. Checksums of frames are checked.
func NewReader(src io.Reader) *Reader {
	r := new(Reader)
	if r.d, r.err = newDecoder(); r.err == nil {
		r.d.frames.reset(src, 0)
	}
	return r
}

// Resume reads on from the start of a frame, where src is the blob from byte
// c.Bit/8 on. The first byte read is plain byte c.Out. Src may end behind any
// frame, or when all that will be read is complete.
func (p *Pool) Resume(src io.Reader, c index.Checkpoint) *Reader {
	r := &Reader{pool: p, total: c.Out}
	var ok bool
	if r.d, ok = p.free.Get().(*decoder); !ok {
		r.d, r.err = newDecoder()
	}
	if r.err == nil {
		r.d.frames.reset(src, c.Bit/8)
	}
	return r
}

// Record makes the reader keep a checkpoint at the start of a frame when the
// last one is at least span plain bytes away. It must be called before the
// first Read.
func (r *Reader) Record(span int64) { r.span = span }

// Checkpoints are those recorded so far, by rising position. The first one is
// at the first frame of the blob.
func (r *Reader) Checkpoints() []index.Checkpoint { return r.points }

// Close gives the decoder back; reading has an error from then on. It may have
// to wait for a Read of the source to return.
func (r *Reader) Close() error {
	if d := r.d; d != nil {
		r.d = nil
		r.release(d)
	}
	r.err = errors.New("read of a closed zstd reader")
	return nil
}

func (r *Reader) release(d *decoder) {
	if r.pool == nil || d.window > maxPooled {
		d.z.Close()
		return
	}
	if err := d.z.Reset(nil); err == nil {
		d.frames.reset(nil, 0)
		r.pool.free.Put(d)
	}
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	for len(p) > 0 && r.err == nil {
		if !r.inside {
			r.err = r.begin()
			continue
		}
		n, err := r.d.z.Read(p)
		r.total += int64(n)
		if errors.Is(err, io.EOF) {
			r.inside, err = false, nil
		}
		if err != nil {
			r.err = r.failed(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// Discard skips n plain bytes.
func (r *Reader) Discard(n int64) error {
	_, err := io.CopyN(io.Discard, r, n)
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// begin goes on to the next frame.
func (r *Reader) begin() error {
	window, err := r.d.frames.next()
	if errors.Is(err, io.EOF) && r.d.frames.pos == 0 {
		return fmt.Errorf("zstd data is empty: %w", io.ErrUnexpectedEOF)
	}
	if err != nil {
		return err
	}
	r.start, r.inside = r.d.frames.pos, true
	r.d.window = max(r.d.window, window)
	r.mark()
	return r.d.z.Reset(&r.d.frames)
}

// failed is the error for a frame that does not decode.
func (r *Reader) failed(err error) error {
	if r.d.frames.err != nil {
		return r.d.frames.err
	}
	return fmt.Errorf("zstd frame at byte %d: %w: %w", r.start, err, errdefs.ErrDataLoss)
}

// maxPoints bounds the checkpoints of one blob: of many small frames it would
// have any number.
const maxPoints = 64 << 10

// mark records a checkpoint when it is time for one.
func (r *Reader) mark() {
	if n := len(r.points); r.span == 0 || n > 0 && r.total-r.points[n-1].Out < r.span {
		return
	}
	r.points = append(r.points, index.Checkpoint{Bit: r.start * 8, Out: r.total})
	if len(r.points) >= maxPoints {
		r.thin()
	}
}

// thin drops every second checkpoint and takes further ones at twice the
// distance. The first, from which everything can be reached, stays.
func (r *Reader) thin() {
	kept := r.points[:0]
	for i := 0; i < len(r.points); i += 2 {
		kept = append(kept, r.points[i])
	}
	r.points, r.span = kept, 2*r.span
}
