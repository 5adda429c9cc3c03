package index

import (
	_ "crypto/sha256" // digests of this package's objects
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Limits of what is decoded. They are far above any image and keep sums of
// offsets far from overflow.
const (
	MaxChunks  = 64 << 20        // chunks in a table
	MaxSegment = 16 << 40        // bytes of a segment: what 32-bit block addresses reach
	minChunk   = len(Sum{}) + 2  // bytes that a chunk takes in an encoded table, at least
	tableFixed = headerSize + 12 // bytes before the first sum
)

// EncodeTable returns the one encoding of a table: the same table gives the
// same bytes always, and different tables different bytes. The table must be
// one that Validate accepts.
func EncodeTable(t *Table) []byte {
	b := make([]byte, 0, tableFixed+len(t.Chunks)*(minChunk+2))
	b = appendHeader(b, magicTable, tableVersion, uint16(t.Algorithm))
	b = binary.LittleEndian.AppendUint64(b, uint64(t.Size))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(t.Chunks)))
	for i := range t.Chunks {
		b = append(b, t.Chunks[i].Sum[:]...)
	}
	end := int64(0)
	for _, c := range t.Chunks {
		b = binary.AppendUvarint(b, uint64(c.Off-end))
		b = binary.AppendUvarint(b, uint64(c.Len))
		end = c.End()
	}
	return b
}

// DecodeTable reads what EncodeTable wrote and checks it. It refuses every
// other encoding, so that EncodeTable gives the same bytes again.
func DecodeTable(b []byte) (*Table, error) {
	r := reader{b: b}
	algorithm := r.header(magicTable, tableVersion, uint16(Vouched))
	size, n := r.u64(), r.u32()
	if r.err == nil && (n > MaxChunks || int64(n)*int64(minChunk) > int64(r.left())) {
		r.fail(fmt.Errorf("%d chunks do not fit into %d bytes", n, len(b)))
	}
	if r.err == nil && size > MaxSegment {
		r.fail(fmt.Errorf("segment size %d is over %d", size, int64(MaxSegment)))
	}
	if r.err != nil {
		return nil, invalid("decode table: %w", r.err)
	}
	t := &Table{Size: int64(size), Algorithm: Algorithm(algorithm), Chunks: make([]Chunk, n)}
	for i := range t.Chunks {
		copy(t.Chunks[i].Sum[:], r.take(uint64(len(Sum{}))))
	}
	end := int64(0)
	for i := range t.Chunks {
		c := &t.Chunks[i]
		c.Off = end + r.limited("gap", t.Size-end)
		c.Len = r.limited("chunk length", t.Size-c.Off)
		end = c.End()
	}
	if err := errors.Join(r.end(), t.Validate()); err != nil {
		return nil, invalid("decode table: %w", err)
	}
	return t, nil
}

// ID is the digest of the encoded table.
func (t *Table) ID() ID { return digest.FromBytes(EncodeTable(t)) }

// Validate checks what the type promises: sizes in bounds, chunks rising and
// apart from each other.
func (t *Table) Validate() error {
	if t.Size < 0 || t.Size > MaxSegment || t.Size%BlockSize != 0 {
		return invalid("segment size %d is not whole blocks up to %d", t.Size, int64(MaxSegment))
	}
	if t.Algorithm > Vouched {
		return invalid("unknown algorithm %d", t.Algorithm)
	}
	if len(t.Chunks) > MaxChunks {
		return invalid("%d chunks are over %d", len(t.Chunks), MaxChunks)
	}
	end := int64(0)
	for i, c := range t.Chunks {
		if c.Len < 1 || c.Len > MaxChunk || c.Off < end || c.Off > t.Size-c.Len {
			return invalid("chunk %d at %d, %d bytes, does not lie between %d and %d", i, c.Off, c.Len, end, t.Size)
		}
		end = c.End()
	}
	return nil
}
