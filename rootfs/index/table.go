package index

import (
	"crypto/sha256"
	"fmt"
	"sort"

	"github.com/opencontainers/go-digest"
	"github.com/zeebo/blake3"
)

// UnitSize bounds the chunks of a segment without file chunks of its own, in
// bytes: how much is read to verify one byte. Where they are cut, package layer
// says.
const UnitSize = 64 << 10

// MaxChunk bounds a chunk's plain length in bytes, and so the memory that
// verifying one takes.
const MaxChunk = 16 << 20

// Algorithm says what the sums of a table are.
type Algorithm uint8

// Algorithms.
const (
	// SHA256 and BLAKE3 sums are digests of a chunk's plain bytes.
	SHA256 Algorithm = iota
	BLAKE3           // with 32 bytes of output
	// Vouched sums are names: whoever has two chunks of one name has the same
	// bytes, but the bytes alone do not tell. They come from an index that has
	// digests of compressed spans only (SOCI). Such a chunk is as good as its
	// source, which has checked the spans.
	Vouched
)

// String is the algorithm's name for people.
func (a Algorithm) String() string {
	switch a {
	case SHA256:
		return "sha256"
	case BLAKE3:
		return "blake3"
	case Vouched:
		return "spans"
	}
	return fmt.Sprintf("algorithm %d", uint8(a))
}

// Sum is the digest of a chunk's plain bytes, or its name (see Algorithm).
type Sum [32]byte

// Sum computes the digest of plain bytes. There is none for Vouched, for which
// it returns zero.
func (a Algorithm) Sum(b []byte) Sum {
	switch a {
	case SHA256:
		return sha256.Sum256(b)
	case BLAKE3:
		return blake3.Sum256(b)
	}
	return Sum{}
}

// Chunk is a range of a segment that is fetched and verified as a whole.
type Chunk struct {
	Off int64 // plain bytes, in the segment
	Len int64 // plain bytes, 1 to MaxChunk
	Sum Sum
}

// End is the offset behind the chunk.
func (c Chunk) End() int64 { return c.Off + c.Len }

// Table lists the chunks of one segment by rising offset, without overlap.
// What no chunk covers (padding between files, holes) is zero bytes.
type Table struct {
	Size      int64 // of the segment in bytes, a multiple of BlockSize
	Algorithm Algorithm
	Chunks    []Chunk
}

// Find returns the number of the first chunk that ends behind off; it is
// len(t.Chunks) when none does.
func (t *Table) Find(off int64) int {
	return sort.Search(len(t.Chunks), func(i int) bool { return t.Chunks[i].End() > off })
}

// ID names a segment: the digest of its encoded table. Two layers with the
// same table have the same plain bytes and share one segment.
type ID = digest.Digest
