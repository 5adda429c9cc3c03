package index

import (
	_ "crypto/sha512" // a manifest may name blobs by it
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// MaxWindow is how much plain data before a checkpoint inflating can refer to,
// in bytes.
const MaxWindow = 32 << 10

// MaxEntries bounds the names that one layer may bring.
const MaxEntries = 4 << 20

// Plain lengths of sections, at most, in bytes.
const (
	maxMeta    = 1 << 20
	maxEntries = 1 << 30
	maxTable   = tableFixed + MaxChunks*(int64(minChunk)+10)
	maxAccess  = 4 << 30
)

// EncodeLayer encodes all that is known of a layer; the same layer gives the
// same bytes. The layer is checked first: see Layer.Validate.
func EncodeLayer(l *Layer) ([]byte, error) {
	if err := l.Validate(); err != nil {
		return nil, fmt.Errorf("encode layer %s: %w", l.Blob, err)
	}
	p, err := newPacker()
	if err != nil {
		return nil, fmt.Errorf("encode layer %s: %w", l.Blob, err)
	}
	b := appendHeader(nil, magicLayer)
	b = p.section(b, appendLayerMeta(nil, l))
	b = p.section(b, EncodeTable(&l.Table))
	b = p.section(b, appendEntries(nil, l.Entries))
	b = p.section(b, appendExtents(nil, l.Access.Extents))
	b = p.section(b, appendCheckpoints(nil, l.Access.Checkpoints))
	b = p.section(b, appendPieces(nil, l.Access.Pieces))
	return b, nil
}

// DecodeLayer reads what EncodeLayer wrote and checks it as Layer.Validate
// does. The bytes may come from anywhere. The layer may share b's memory.
func DecodeLayer(b []byte) (*Layer, error) {
	u, err := newUnpacker()
	if err != nil {
		return nil, fmt.Errorf("decode layer: %w", err)
	}
	defer u.close()
	r := reader{b: b}
	r.header(magicLayer)
	l := new(Layer)
	r.part(u, "metadata", maxMeta, l.readMeta)
	r.part(u, "table", maxTable, func(p []byte) error {
		t, err := DecodeTable(p)
		if err == nil {
			l.Table = *t
		}
		return err
	})
	r.part(u, "entries", maxEntries, func(p []byte) (err error) {
		l.Entries, err = readEntries(p, l.Table.Size)
		return err
	})
	r.part(u, "extents", maxAccess, l.Access.readExtents)
	r.part(u, "checkpoints", maxAccess, l.Access.readCheckpoints)
	r.part(u, "pieces", maxAccess, l.Access.readPieces)
	if err := r.end(); err != nil {
		return nil, invalid("decode layer: %w", err)
	}
	// The entries have been checked while they were read.
	if err := errors.Join(l.checkIdentity(), l.checkAccess()); err != nil {
		return nil, invalid("decode layer: %w", err)
	}
	return l, nil
}

// part takes a section and hands it to read; it does nothing after a failure.
func (r *reader) part(u *unpacker, what string, limit int64, read func([]byte) error) {
	if r.err != nil {
		return
	}
	p := u.section(r, what, limit)
	if r.err != nil {
		return
	}
	if err := read(p); err != nil {
		r.fail(fmt.Errorf("%s: %w", what, err))
	}
}

func appendLayerMeta(b []byte, l *Layer) []byte {
	b = append(b, byte(l.Access.Format))
	b = appendString(b, l.Blob)
	b = binary.AppendUvarint(b, uint64(l.BlobSize))
	return appendString(b, l.DiffID)
}

func (l *Layer) readMeta(p []byte) error {
	r := reader{b: p}
	l.Access.Format = Format(r.u8())
	l.Blob = digest.Digest(r.str())
	l.BlobSize = r.limited("blob size", maxBlob)
	l.DiffID = digest.Digest(r.str())
	return r.end()
}

// appendExtents writes each extent as distances from the end of the one
// before, in the segment and in the stream.
func appendExtents(b []byte, extents []Extent) []byte {
	b = binary.AppendUvarint(b, uint64(len(extents)))
	var last Extent
	for _, e := range extents {
		b = binary.AppendUvarint(b, uint64(e.Seg-last.Seg-last.Len))
		b = binary.AppendVarint(b, e.Tar-last.Tar-last.Len)
		b = binary.AppendUvarint(b, uint64(e.Len))
		last = e
	}
	return b
}

func (a *Access) readExtents(p []byte) error {
	r := reader{b: p}
	n := r.limited("number of extents", int64(len(p)/3))
	if n > 0 {
		a.Extents = make([]Extent, n)
	}
	var last Extent
	for i := range a.Extents {
		seg := last.Seg + last.Len + r.limited("gap", MaxSegment)
		tar := last.Tar + last.Len + r.varint()
		last = Extent{Seg: seg, Tar: tar, Len: r.limited("length", MaxSegment)}
		// Checked here and not only later: the sums above must not overflow.
		if r.err != nil || !last.within(MaxSegment, maxStream) {
			r.fail(fmt.Errorf("extent %d out of range", i))
			break
		}
		a.Extents[i] = last
	}
	return r.end()
}

// appendCheckpoints writes positions first and all windows behind them, where
// they compress best.
func appendCheckpoints(b []byte, points []Checkpoint) []byte {
	b = binary.AppendUvarint(b, uint64(len(points)))
	var last Checkpoint
	for _, c := range points {
		b = binary.AppendUvarint(b, uint64(c.Bit-last.Bit))
		b = binary.AppendUvarint(b, uint64(c.Out-last.Out))
		b = binary.AppendUvarint(b, uint64(len(c.Window)))
		last = c
	}
	for _, c := range points {
		b = append(b, c.Window...)
	}
	return b
}

func (a *Access) readCheckpoints(p []byte) error {
	r := reader{b: p}
	n := r.limited("number of checkpoints", int64(len(p)/3))
	if n > 0 {
		a.Checkpoints = make([]Checkpoint, n)
	}
	windows := make([]uint16, len(a.Checkpoints))
	var bit, out int64
	for i := range a.Checkpoints {
		bit += r.limited("position", maxBlob*8-bit)
		out += r.limited("plain position", maxStream-out)
		windows[i] = uint16(r.limited("window", MaxWindow))
		a.Checkpoints[i] = Checkpoint{Bit: bit, Out: out}
	}
	for i, n := range windows {
		a.Checkpoints[i].Window = r.take(uint64(n))
	}
	return r.end()
}

func appendPieces(b []byte, pieces []Piece) []byte {
	b = binary.AppendUvarint(b, uint64(len(pieces)))
	last := int64(0)
	for _, p := range pieces {
		b = binary.AppendVarint(b, p.Off-last)
		b = binary.AppendUvarint(b, uint64(p.Len))
		b = binary.AppendUvarint(b, uint64(p.Inner))
		last = p.Off
	}
	return b
}

func (a *Access) readPieces(p []byte) error {
	r := reader{b: p}
	n := r.limited("number of pieces", int64(len(p)/3))
	if n > 0 {
		a.Pieces = make([]Piece, n)
	}
	last := int64(0)
	for i := range a.Pieces {
		off := last + r.varint()
		if off < 0 || off > maxBlob {
			r.fail(fmt.Errorf("piece %d out of range", i))
			break
		}
		a.Pieces[i] = Piece{Off: off, Len: r.limited("length", maxBlob), Inner: r.limited("inner offset", maxStream)}
		last = off
	}
	return r.end()
}
