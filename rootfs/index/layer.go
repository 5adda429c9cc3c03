package index

import "github.com/opencontainers/go-digest"

// Layer is what is known of one layer: who its files are, what its segment
// holds, and how the segment's bytes come out of the blob.
type Layer struct {
	Blob     digest.Digest // as the manifest names it
	BlobSize int64         // bytes
	DiffID   digest.Digest // of the uncompressed tar; empty when not known (a TOC does not tell)
	Entries  []Entry       // in layer order
	Table    Table
	Access   Access
}

// Format says how a blob is packed.
type Format uint8

// Formats of a blob.
const (
	Tar     Format = iota + 1 // uncompressed: plain offset is blob offset
	Gzip                      // one or more gzip members, read from Checkpoints
	Members                   // every chunk in a gzip member of its own or with neighbours (eStargz): Pieces
)

// Access tells where the bytes of a segment are in its blob.
type Access struct {
	Format Format
	// Extents map the segment to the plain tar stream (Tar, Gzip), by rising
	// Seg; what no extent covers is zero.
	Extents []Extent
	// Checkpoints are where inflating can start (Gzip), by rising Out.
	Checkpoints []Checkpoint
	// Pieces has one element for each chunk of the table (Members).
	Pieces []Piece
}

// Extent is a run of bytes that the tar stream and the segment have in common.
type Extent struct {
	Seg, Tar, Len int64 // offset in the segment, offset in the tar, length; bytes
}

// Checkpoint is a DEFLATE block boundary.
type Checkpoint struct {
	Bit    int64  // position in the blob in bits: byte Bit/8, bit Bit%8 from the least significant
	Out    int64  // plain bytes before it
	Window []byte // the plain bytes just before it, at most 32 KiB; empty at the start of a member
}

// Piece is where one chunk lies in the blob.
type Piece struct {
	Off, Len int64 // the gzip member in the blob, bytes; Len reaches to the next member
	Inner    int64 // where the chunk starts in the inflated member, bytes
}
