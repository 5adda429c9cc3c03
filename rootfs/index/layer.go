package index

import (
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Layer is what is known of one layer: who its files are, what its segment
// holds, and how the segment's bytes come out of the blob. An image whose files
// are not sorted by layer (Nydus) is one Layer as a whole.
type Layer struct {
	Blob     digest.Digest // as the manifest names it
	BlobSize int64         // bytes
	DiffID   digest.Digest // of the uncompressed tar; empty when not known (a TOC does not tell)
	Entries  []Entry       // in layer order
	Table    Table
	// Prefetch lists what a start is likely to read, in ranges of the segment,
	// the first first. A hint of the publisher.
	Prefetch []Range
	Access   Access
	// Skeleton is what the uncompressed tar has between and around the extents,
	// in its order: with the segment's bytes it makes the tar again, whose digest
	// is DiffID. Empty when not known.
	Skeleton []byte
}

// Range is a range of bytes.
type Range struct{ Off, Len int64 }

// Format says how a blob is packed.
type Format uint8

// Formats of a blob.
const (
	Tar     Format = iota + 1 // uncompressed: plain offset is blob offset
	Gzip                      // one or more gzip members, read from Checkpoints
	Zstd                      // one or more zstd frames, read from Checkpoints
	Chunked                   // every chunk can be had by itself or with few neighbours: Pieces
)

// String is the format's name for people.
func (f Format) String() string {
	switch f {
	case Tar:
		return "tar"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	case Chunked:
		return "chunked"
	}
	return fmt.Sprintf("format %d", uint8(f))
}

// Access tells where the bytes of a segment are in its blob.
type Access struct {
	Format Format
	// Blobs are the other blobs that pieces are in (Chunked).
	Blobs []BlobRef
	// Extents map the segment to the plain tar stream (Tar, Gzip, Zstd), by
	// rising Seg; what no extent covers is zero.
	Extents []Extent
	// Checkpoints are where decompressing can start: of Gzip and Zstd by rising
	// Out, those of Zstd are starts of frames. Of Chunked the pieces say which.
	Checkpoints []Checkpoint
	// Pieces has one element for each chunk of the table (Chunked).
	Pieces []Piece
	// Spans are digests of compressed ranges of the layer's blob (Tar, Gzip,
	// Zstd), by rising offset. Where there are any the table's algorithm is
	// Vouched, and nothing of the blob may be used that was not checked by them.
	Spans []Span
}

// BlobRef names a blob.
type BlobRef struct {
	Digest digest.Digest
	Size   int64 // bytes
}

// Extent is a run of bytes that the tar stream and the segment have in common.
type Extent struct {
	Seg, Tar, Len int64 // offset in the segment, offset in the tar, length; bytes
}

// Checkpoint is a DEFLATE block boundary or the start of a zstd frame.
type Checkpoint struct {
	Bit    int64  // position in the blob in bits: byte Bit/8, bit Bit%8 from the least significant
	Out    int64  // plain bytes before it
	Window []byte // the plain bytes just before it, at most 32 KiB; empty at the start of a member or frame
}

// Codec is how a piece is compressed.
type Codec uint8

// Codecs.
const (
	Stored     Codec = iota // plain bytes
	GzipMember              // a gzip member
	ZstdFrame               // zstd frames
	LZ4Block                // one LZ4 block, without a frame
	Deflate                 // DEFLATE data from a checkpoint on
)

// Piece is where one chunk lies in a blob.
type Piece struct {
	Off, Len int64  // of the compressed data in the blob, bytes; Len may reach to the next piece
	Inner    int64  // where the chunk starts in what Off and Len decompress to, bytes
	Blob     uint16 // 0: the layer's own; else the number in Access.Blobs, from 1
	Codec    Codec
	Point    uint32 // Deflate: number of the checkpoint, whose byte is Off
}

// Span is a range of a blob with the digest of its bytes as they are stored.
type Span struct {
	Off, Len int64
	Sum      Sum // SHA-256
}

// End is the offset behind the span.
func (s Span) End() int64 { return s.Off + s.Len }
