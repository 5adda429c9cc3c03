package convert

import (
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Format is what a layer is converted to.
type Format uint8

// Formats; the package comment compares them.
const (
	EStargz Format = iota + 1
	ZstdChunked
	ZstdStargz
)

// Options of Layer. Only Format has no default.
type Options struct {
	Format Format
	// Level is gzip's from 1 to 9, or zstd's from 1 to 19, of which the encoder
	// tells four apart. 0 means 6 for gzip, as level 9 takes five times as long
	// for 4 % less, and 3 for zstd.
	Level int
	// ChunkSize is the largest chunk in plain bytes, up to index.MaxChunk. The
	// chunks of stargz-snapshotter's formats have just this size; those of
	// ZstdChunked end where the content says, a third of it on average, so that
	// a change in a file leaves most of its chunks the same. 0 means 4 MiB for
	// EStargz and 1 MiB for zstd.
	ChunkSize int64
	// Pack is how many plain bytes of small files may share a member, which
	// makes the blob smaller, and what is read for one small file larger.
	// Readers older than stargz-snapshotter 0.14 do not know such blobs, and
	// ZstdChunked cannot have them. 0 means none do.
	Pack int64
	// Profile lists paths of files that a start reads, in their order. They
	// come first in the blob, which lets a runtime prefetch them by one range.
	// The tar must then be an io.ReaderAt.
	Profile []string
	// Workers is how many goroutines compress; 0 means one for each processor.
	// The blob does not depend on it.
	Workers int
}

// Result describes a converted layer.
type Result struct {
	// Descriptor is what the manifest says of the layer, with the annotations
	// that make it lazily readable. Its media type is OCI's: in a Docker
	// manifest gzip layers need Docker's.
	Descriptor ocispec.Descriptor
	// DiffID is the digest of the plain tar in the blob, and PlainSize its size
	// in bytes.
	DiffID    digest.Digest
	PlainSize int64
	// TOC is the digest by which readers of the format check the TOC.
	TOC digest.Digest
	// Missing lists the paths of the profile that were not put first: the layer
	// does not have them, or it is not certain that an unpacker would make the
	// same of the layer then.
	Missing []string
}

// Defaults of Options, and a bound of the memory for one worker.
const (
	gzipLevel = 6
	zstdLevel = 3
	gzipChunk = 4 << 20
	zstdChunk = 1 << 20
	minChunk  = 4 << 10
)

// complete fills in defaults and checks values.
func (o Options) complete() (Options, error) {
	chunk, level, top := int64(zstdChunk), zstdLevel, 19
	switch o.Format {
	case EStargz:
		chunk, level, top = gzipChunk, gzipLevel, 9
	case ZstdChunked, ZstdStargz:
	default:
		return o, fmt.Errorf("format %d is not one to convert to: %w", o.Format, errdefs.ErrInvalidArgument)
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = chunk
	}
	if o.Level == 0 {
		o.Level = level
	}
	if o.Workers == 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	return o, o.check(top)
}

func (o Options) check(topLevel int) error {
	var what string
	switch {
	case o.Level < 1 || o.Level > topLevel:
		what = fmt.Sprintf("level %d is not between 1 and %d", o.Level, topLevel)
	case o.ChunkSize < minChunk || o.ChunkSize > index.MaxChunk:
		what = fmt.Sprintf("chunk size %d is not between %d and %d bytes", o.ChunkSize, minChunk, index.MaxChunk)
	case o.Pack < 0 || o.Pack > index.MaxChunk:
		what = fmt.Sprintf("pack size %d is not between 0 and %d bytes", o.Pack, index.MaxChunk)
	case o.Pack > 0 && o.Format == ZstdChunked:
		what = "zstd:chunked cannot pack several files together; leave pack at 0"
	case o.Workers < 0:
		what = fmt.Sprintf("%d workers", o.Workers)
	default:
		return nil
	}
	return fmt.Errorf("%s: %w", what, errdefs.ErrInvalidArgument)
}

// landmarks tells whether the format has a landmark in layers without a
// profile too.
func (f Format) landmarks() bool { return f != ZstdChunked }
