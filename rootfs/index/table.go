package index

import (
	"sort"

	"github.com/opencontainers/go-digest"
)

// UnitSize is how a segment without file chunks of its own is cut: the unit of
// verification in bytes.
const UnitSize = 64 << 10

// MaxChunk bounds a chunk's plain length in bytes, and so the memory that
// verifying one takes.
const MaxChunk = 16 << 20

// Sum is a SHA-256 digest.
type Sum [32]byte

// Chunk is a range of a segment that is fetched and verified as a whole.
type Chunk struct {
	Off int64 // plain bytes, in the segment
	Len int64 // plain bytes, 1 to MaxChunk
	Sum Sum   // of the plain bytes
}

// End is the offset behind the chunk.
func (c Chunk) End() int64 { return c.Off + c.Len }

// Table lists the chunks of one segment by rising offset, without overlap.
// What no chunk covers (padding between files, holes) is zero bytes.
type Table struct {
	Size   int64 // of the segment in bytes, a multiple of BlockSize
	Chunks []Chunk
}

// Find returns the number of the first chunk that ends behind off; it is
// len(t.Chunks) when none does.
func (t *Table) Find(off int64) int {
	return sort.Search(len(t.Chunks), func(i int) bool { return t.Chunks[i].End() > off })
}

// ID names a segment: the digest of its encoded table. Two layers with the
// same table have the same plain bytes and share one segment.
type ID = digest.Digest
