package layer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
	"github.com/tatami-containers/tatami/rootfs/layer/zstd"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// maxGap is how many bytes that nobody asked for are read over, rather than
// asking the blob for a second range.
const maxGap = 256 << 10

// Reader reads a layer's segment out of its blobs. Any number of goroutines may
// use it; streams that it opened have one user each.
type Reader struct {
	layer *index.Layer
	blobs Blobs
	own   Blob // the layer's
	cpu   *sched.Slots
}

// Decoders are shared by all Readers, for most of those live for one fetch.
var (
	gzipPool gzip.Pool
	zstdPool zstd.Pool
)

// Blobs finds a blob of a layer: its own or one of Access.Blobs.
type Blobs func(ref index.BlobRef) Blob

// OneBlob is the Blobs of a layer that has no other than its own.
func OneBlob(b Blob) Blobs { return func(index.BlobRef) Blob { return b } }

// NewReader reads the segment of l from its blobs. It keeps l, which must be
// valid (index.Layer.Validate) and not change.
func NewReader(l *index.Layer, blobs Blobs) *Reader {
	return &Reader{layer: l, blobs: blobs, own: blobs(index.BlobRef{Digest: l.Blob, Size: l.BlobSize})}
}

// Under lets streams that r opens unpack in turns of cpu, as the work of their
// contexts; none has a turn while it waits for a blob. It returns r.
func (r *Reader) Under(cpu *sched.Slots) *Reader {
	r.cpu = cpu
	return r
}

// worker is who reads a stream under ctx. Plain bytes that nobody compares are only
// passed on, for which there is no need to wait.
func (r *Reader) worker(ctx context.Context) *sched.Worker {
	if r.layer.Access.Format == index.Tar && len(r.layer.Access.Spans) == 0 {
		return nil
	}
	return r.cpu.Worker(ctx)
}

// blob is the layer's own for 0, checked by spans if there are any, else one of
// Access.Blobs. It is worker that waits for it.
func (r *Reader) blob(n uint16, worker *sched.Worker) Blob {
	if n > 0 {
		return Waiting(r.blobs(r.layer.Access.Blobs[n-1]), worker)
	}
	own := Waiting(r.own, worker)
	if spans := r.layer.Access.Spans; len(spans) > 0 {
		return &spanned{blob: own, name: r.layer.Blob, spans: spans}
	}
	return own
}

// Open reads n plain bytes of the segment from offset off on. The blob is asked
// for what the range needs and no more, as it is read, under ctx. What no
// extent or chunk covers is zeros. The stream has n bytes or an error; the
// bytes are not verified. ErrInvalidArgument if the range leaves the segment.
func (r *Reader) Open(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	size := r.layer.Table.Size
	if off < 0 || n < 0 || off > size || n > size-off {
		return nil, fmt.Errorf("layer %s: range %d+%d of a segment of %d bytes: %w",
			r.layer.Blob, off, n, size, errdefs.ErrInvalidArgument)
	}
	s := &stream{layer: r.layer, worker: r.worker(ctx), pos: off, end: off + n, dataEnd: off}
	switch r.layer.Access.Format {
	case index.Tar, index.Gzip, index.Zstd:
		s.runs = newExtentRuns(ctx, r, s.worker, off, off+n)
	case index.Chunked:
		if len(r.layer.Access.Pieces) != len(r.layer.Table.Chunks) {
			return nil, r.invalid("pieces and chunks differ in number")
		}
		s.runs = newPieceRuns(ctx, r, s.worker, off, off+n)
	default:
		return nil, r.invalid("unknown format")
	}
	return s, nil
}

func (r *Reader) invalid(what string) error {
	return fmt.Errorf("index of layer %s: %s: %w", r.layer.Blob, what, errdefs.ErrDataLoss)
}

// run is a part of a segment that is stored in the blob.
type run struct {
	off, end int64     // in the segment
	data     io.Reader // at least end-off bytes
}

// runs finds the data of a range.
type runs interface {
	// next returns the first run that ends behind off, cut to the range; false
	// if only zeros follow. off never goes back.
	next(off int64) (run, bool, error)
	Close() error
}

// stream is a range of a segment: runs of data with zeros around them.
type stream struct {
	layer  *index.Layer
	runs   runs
	run    run
	worker *sched.Worker
	err    error // sticky

	pos, end int64 // what is left
	data     int64 // where run begins, or end
	dataEnd  int64 // and ends
}

// Read implements io.Reader.
func (s *stream) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if s.pos == s.end {
		return 0, io.EOF
	}
	if err := s.worker.Begin(); err != nil {
		return 0, s.fail(err)
	}
	defer s.worker.End()
	if s.pos == s.dataEnd {
		if err := s.advance(); err != nil {
			return 0, s.fail(err)
		}
	}
	if s.pos < s.data {
		k := min(int64(len(p)), s.data-s.pos)
		clear(p[:k])
		s.pos += k
		return int(k), nil
	}
	n, err := s.run.data.Read(p[:min(int64(len(p)), s.dataEnd-s.pos)])
	s.pos += int64(n)
	if err == io.EOF && s.pos < s.dataEnd {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		return n, s.fail(err)
	}
	return n, nil
}

// advance goes on to the next run.
func (s *stream) advance() error {
	r, ok, err := s.runs.next(s.pos)
	if err != nil {
		return err
	}
	if !ok {
		s.data, s.dataEnd = s.end, s.end
		return nil
	}
	s.run, s.data, s.dataEnd = r, r.off, r.end
	return nil
}

func (s *stream) fail(err error) error {
	s.err = fmt.Errorf("layer %s: segment at %d: %w", s.layer.Blob, s.pos, err)
	return s.err
}

// Close ends the requests that are still open.
func (s *stream) Close() error {
	if s.runs == nil {
		return nil
	}
	err := s.runs.Close()
	s.runs, s.err = nil, errors.New("read of a closed layer stream")
	return err
}

// plain is what a decoder makes of compressed bytes.
type plain interface {
	io.ReadCloser
	Discard(n int64) error
}

// discard drops n bytes, which r must have. It ends with ctx, for n may be far
// more than what the blob is asked for.
func discard(ctx context.Context, r io.Reader, n int64) error {
	for ; n > 0; n -= min(n, maxGap) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := discardSome(r, min(n, maxGap)); err != nil {
			return err
		}
	}
	return nil
}

func discardSome(r io.Reader, n int64) error {
	var err error
	if z, ok := r.(plain); ok {
		err = z.Discard(n)
	} else {
		_, err = io.CopyN(io.Discard, r, n)
	}
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
