package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"sync/atomic"

	"github.com/containerd/errdefs"
)

// bitmap has one bit for each chunk; bits are read and set without a lock.
type bitmap []atomic.Uint64

func newBitmap(n int) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) has(i int) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }

// set sets bit i and reports whether it was 0.
func (b bitmap) set(i int) bool { return b[i/64].Or(1<<(i%64))&(1<<(i%64)) == 0 }

// add sets the bits that are set in other.
func (b bitmap) add(other bitmap) {
	for i := range b {
		b[i].Or(other[i].Load())
	}
}

// clone copies b word by word: bits that are set meanwhile may be missing.
func (b bitmap) clone() bitmap {
	out := make(bitmap, len(b))
	out.add(b)
	return out
}

func (b bitmap) empty() bool {
	for i := range b {
		if b[i].Load() != 0 {
			return false
		}
	}
	return true
}

func (b bitmap) clear(i int) { b[i/64].And(^uint64(1 << (i % 64))) }

// The bitmap file, little-endian: magic, version and flags (4 bytes each, flags
// 0), number of chunks (8 bytes), the bits in words of 8 bytes, and a CRC-32C
// over all before it.
const (
	bitsMagic   = "TATAMI\x00B"
	bitsVersion = 1
	bitsHeader  = len(bitsMagic) + 4 + 4 + 8
	bitsTrailer = 4
)

func encodeBits(b bitmap, n int) []byte {
	le := binary.LittleEndian
	out := make([]byte, 0, bitsHeader+8*len(b)+bitsTrailer)
	out = append(out, bitsMagic...)
	out = le.AppendUint32(out, bitsVersion)
	out = le.AppendUint32(out, 0)
	out = le.AppendUint64(out, uint64(n))
	for i := range b {
		out = le.AppendUint64(out, b[i].Load())
	}
	return le.AppendUint32(out, crc32.Checksum(out, crc32.MakeTable(crc32.Castagnoli)))
}

// decodeBits decodes the bitmap of a segment of n chunks.
func decodeBits(data []byte, n int) (bitmap, error) {
	b := newBitmap(n)
	le := binary.LittleEndian
	switch {
	case len(data) != bitsHeader+8*len(b)+bitsTrailer:
		return nil, fmt.Errorf("bitmap of %d bytes for %d chunks: %w", len(data), n, errdefs.ErrDataLoss)
	case string(data[:8]) != bitsMagic, le.Uint32(data[8:]) != bitsVersion, le.Uint32(data[12:]) != 0:
		return nil, fmt.Errorf("bitmap has an unknown magic, version or flag: %w", errdefs.ErrDataLoss)
	case le.Uint64(data[16:]) != uint64(n):
		return nil, fmt.Errorf("bitmap for %d chunks, want %d: %w", le.Uint64(data[16:]), n, errdefs.ErrDataLoss)
	}
	body := data[:len(data)-bitsTrailer]
	if le.Uint32(data[len(body):]) != crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)) {
		return nil, fmt.Errorf("bitmap has a wrong checksum: %w", errdefs.ErrDataLoss)
	}
	for i := range b {
		b[i].Store(le.Uint64(data[bitsHeader+8*i:]))
	}
	if n%64 != 0 && b[len(b)-1].Load()>>(n%64) != 0 {
		return nil, fmt.Errorf("bitmap has bits behind chunk %d: %w", n, errdefs.ErrDataLoss)
	}
	return b, nil
}
