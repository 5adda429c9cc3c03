package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
	"github.com/tatami-containers/tatami/rootfs/layer/zstd"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Options of Build. The zero value is the usual.
type Options struct {
	// Span is how many plain bytes lie between two checkpoints of a gzip
	// blob: what a random read has to inflate at most before it gets to its
	// bytes. Each checkpoint keeps a window of 32 KiB. 0 means 1 MiB, and up
	// to 4 MiB for blobs above 512 MiB. Checkpoints without a window, as all
	// those of zstd are, come up to 8 times as close.
	Span int64
	// Progress, if set, is told how many bytes of the blob were read so far.
	// It is called by another goroutine, but not after Build has returned.
	Progress func(read int64)
	// CPU is what computing waits for, as ctx's work. Nobody has a turn while waiting
	// for r or seg. Nil lets all compute.
	CPU *sched.Slots
	// Skeleton asks for Layer.Skeleton, with which DiffID can be checked when
	// only the segment is there. It is left out if it would be above 1 GiB.
	Skeleton bool
}

// Spans for Options.Span.
const (
	minSpan    = 1 << 20
	maxSpan    = 4 << 20
	spans      = 512 // of a blob, by compressed size
	frameShare = 8   // how much closer checkpoints without a window may be
)

func (o Options) span(size int64) int64 {
	if o.Span > 0 {
		return o.Span
	}
	return min(max(size/spans, minSpan), maxSpan)
}

// Build reads a whole blob from r, a tar that is plain or compressed with gzip
// or zstd, and writes the plain bytes of its segment to seg, which may be a
// ZeroWriter. Nothing that was written may be used before Build returns without
// an error: digest and size of the blob are known only then. On error it may
// have to wait for a Read of r to return.
//
// Errors: ErrDataLoss for a blob that is not the one described (another copy may
// be right) or that does not inflate, ErrInvalidArgument for a media type or, in
// the right blob, a tar that is not supported or not valid; those of r, seg and
// ctx as they are.
func Build(ctx context.Context, r io.Reader, desc Descriptor, seg io.Writer, opts Options) (*index.Layer, error) {
	l, err := build(ctx, r, desc, seg, opts)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return l, nil
}

func build(ctx context.Context, r io.Reader, desc Descriptor, seg io.Writer, opts Options) (*index.Layer, error) {
	if err := CheckMediaType(desc.MediaType); err != nil {
		return nil, err
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithCancel(ctx)
	var stages sync.WaitGroup
	defer stages.Wait()
	defer cancel()

	// Three goroutines share the work: reading and hashing the blob, inflating
	// (most of it; zstd's decoder has some more), and here hashing and sorting
	// out what comes out.
	blob := &verified{ctx: ctx, r: r, desc: desc, verifier: desc.Digest.Verifier(), progress: opts.Progress, worker: opts.CPU.Worker(ctx)}
	packed := startAhead(ctx, &stages, blob, nil)
	head, whole, err := peek(packed)
	if err != nil {
		return nil, err
	}
	worker := opts.CPU.Worker(ctx)
	b := builder{desc: desc, seg: newSegment(seg, worker), skeleton: opts.Skeleton, worker: worker}
	if !gzip.IsGzip(head) && !zstd.IsZstd(head) {
		packed.worker = worker
		l, err := b.scan(whole, index.Tar)
		return l, blame(err, whole)
	}
	z, format := opts.decoder(head, whole, desc.Size)
	defer func() {
		cancel()
		stages.Wait()
		_ = z.Close() // never has an error
	}()
	packed.worker = opts.CPU.Worker(ctx)
	plain := startAhead(ctx, &stages, z, packed.worker)
	plain.worker = worker
	l, err := b.scan(plain, format)
	if err != nil {
		return nil, blame(err, plain, whole)
	}
	stages.Wait()
	l.Access.Checkpoints = z.Checkpoints()
	return l, nil
}

// peek returns the first bytes of a blob, which tell its compression, and the
// whole of it.
func peek(blob io.Reader) (head []byte, whole io.Reader, err error) {
	head = make([]byte, 4)
	n, err := io.ReadFull(blob, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, nil, err
	}
	return head[:n], io.MultiReader(bytes.NewReader(head[:n]), blob), nil
}

// recorder is a decoder that notes where later ones can start.
type recorder interface {
	plain
	Checkpoints() []index.Checkpoint
}

// decoder reads a compressed blob of size bytes, of which head are the first.
func (o Options) decoder(head []byte, blob io.Reader, size int64) (recorder, index.Format) {
	if zstd.IsZstd(head) {
		z := zstd.NewReader(blob)
		z.Record(o.span(size) / frameShare)
		return z, index.Zstd
	}
	z := new(gzip.Pool).NewReader(blob)
	z.Record(o.span(size))
	return z, index.Gzip
}

// blame finds out whether content that makes no sense is the publisher's fault:
// it reads the rest, stage by stage, and if the blob turns out to be another
// one than described says so instead.
func blame(err error, rest ...io.Reader) error {
	if !errdefs.IsInvalidArgument(err) && !errdefs.IsDataLoss(err) {
		return err
	}
	var blobErr error // of the last stage, the blob; others' only follow from err
	for _, r := range rest {
		_, blobErr = io.Copy(io.Discard, r)
	}
	if blobErr != nil {
		return blobErr
	}
	return err
}

// builder turns a tar stream into a layer.
type builder struct {
	desc     Descriptor
	seg      *segment
	skeleton bool          // is wanted
	worker   *sched.Worker // scans
}

func (b *builder) scan(plain io.Reader, format index.Format) (*index.Layer, error) {
	if err := b.worker.Begin(); err != nil {
		return nil, err
	}
	defer b.worker.End()
	l := &index.Layer{Blob: b.desc.Digest, BlobSize: b.desc.Size, Access: index.Access{Format: format}}
	l.DiffID = b.desc.Digest
	var sum hash.Hash
	if format != index.Tar || b.desc.Digest.Algorithm() != digest.Canonical {
		sum = digest.Canonical.Hash()
		plain = &tee{plain, sum}
	}
	seg, bones := tarball.Segment(b.seg), new(skeleton)
	if b.skeleton {
		bones.r = plain
		plain, seg = bones, beside{seg, bones}
	}
	res, err := tarball.Scan(plain, seg)
	if err != nil {
		return nil, err
	}
	if err := b.seg.flush(); err != nil {
		return nil, err
	}
	// Behind the end of the tar: padding, counted by both digests.
	if _, err := io.Copy(io.Discard, plain); err != nil {
		return nil, err
	}
	if sum != nil {
		l.DiffID = digest.NewDigest(digest.Canonical, sum)
	}
	l.Entries, l.Table = res.Entries, b.seg.table
	l.Access.Extents, l.Skeleton = res.Extents, bones.kept
	return l, nil
}

// tee is io.TeeReader for a hash, which has no errors.
type tee struct {
	r   io.Reader
	sum hash.Hash
}

func (t *tee) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.sum.Write(p[:n])
	return n, err
}

// verified reads a blob and ends with io.EOF only if it was the right one.
type verified struct {
	ctx      context.Context
	r        io.Reader
	desc     Descriptor
	verifier digest.Verifier
	read     int64
	progress func(int64)
	worker   *sched.Worker // hashes
}

func (v *verified) Read(p []byte) (int, error) {
	if v.ctx.Err() != nil {
		return 0, context.Cause(v.ctx)
	}
	n, err := v.r.Read(p)
	v.read += int64(n)
	if v.read > v.desc.Size {
		return 0, fmt.Errorf("blob is longer than the %d bytes that its descriptor says: %w", v.desc.Size, errdefs.ErrDataLoss)
	}
	if err := v.hash(p[:n]); err != nil {
		return 0, err
	}
	if v.progress != nil && n > 0 {
		v.progress(v.read)
	}
	if errors.Is(err, io.EOF) {
		err = v.check()
	}
	return n, err
}

func (v *verified) hash(p []byte) error {
	if err := v.worker.Begin(); err != nil {
		return err
	}
	defer v.worker.End()
	_, err := v.verifier.Write(p)
	return err
}

// check compares the blob with its descriptor when it has ended.
func (v *verified) check() error {
	if v.read < v.desc.Size {
		return fmt.Errorf("blob ends after %d of %d bytes: %w: %w",
			v.read, v.desc.Size, io.ErrUnexpectedEOF, errdefs.ErrDataLoss)
	}
	if !v.verifier.Verified() {
		return fmt.Errorf("blob has another digest than its descriptor says: %w", errdefs.ErrDataLoss)
	}
	return io.EOF
}
