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
	b := appendHeader(nil, magicLayer, layerVersion, 0)
	b = p.section(b, appendLayerMeta(nil, l))
	b = p.section(b, EncodeTable(&l.Table))
	b = p.section(b, appendEntries(nil, l.Entries))
	b = p.section(b, appendExtents(nil, l.Access.Extents))
	b = p.section(b, appendCheckpoints(nil, l.Access.Checkpoints))
	b = p.section(b, appendPieces(nil, l.Access.Pieces))
	b = p.section(b, appendSpans(nil, l.Access.Spans))
	b = p.section(b, appendRanges(nil, l.Prefetch))
	b = p.section(b, l.Skeleton)
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
	r.header(magicLayer, layerVersion, 0)
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
	r.part(u, "pieces", maxAccess, func(p []byte) error { return l.Access.readPieces(p, len(l.Table.Chunks)) })
	r.part(u, "spans", maxAccess, l.Access.readSpans)
	r.part(u, "prefetch", maxMeta, func(p []byte) (err error) {
		l.Prefetch, err = readRanges(p)
		return err
	})
	r.part(u, "skeleton", maxAccess, func(p []byte) error {
		if len(p) > 0 {
			l.Skeleton = p
		}
		return nil
	})
	if err := r.end(); err != nil {
		return nil, invalid("decode layer: %w", err)
	}
	// The entries have been checked while they were read.
	if err := errors.Join(l.checkIdentity(), l.checkAccess(), checkRanges(l.Prefetch, l.Table.Size)); err != nil {
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
	b = appendString(b, l.DiffID)
	b = binary.AppendUvarint(b, uint64(len(l.Access.Blobs)))
	for _, x := range l.Access.Blobs {
		b = appendString(b, x.Digest)
		b = binary.AppendUvarint(b, uint64(x.Size))
	}
	return b
}

func (l *Layer) readMeta(p []byte) error {
	r := reader{b: p}
	l.Access.Format = Format(r.u8())
	l.Blob = digest.Digest(r.str())
	l.BlobSize = r.limited("blob size", maxBlob)
	l.DiffID = digest.Digest(r.str())
	if n := r.limited("number of blobs", maxBlobs); n > 0 {
		l.Access.Blobs = make([]BlobRef, n)
	}
	for i := range l.Access.Blobs {
		d := digest.Digest(r.str())
		l.Access.Blobs[i] = BlobRef{d, r.limited("blob size", maxBlob)}
	}
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
	n := r.limited("number of extents", min(maxExtents, int64(len(p)/3)))
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
		b = binary.AppendVarint(b, c.Bit-last.Bit)
		b = binary.AppendVarint(b, c.Out-last.Out)
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
	n := r.limited("number of checkpoints", min(maxCheckpoints, int64(len(p)/3)))
	if n > 0 {
		a.Checkpoints = make([]Checkpoint, n)
	}
	windows := make([]uint16, len(a.Checkpoints))
	var bit, out int64
	for i := range a.Checkpoints {
		bit = r.moved("position", bit, maxBlob*8)
		out = r.moved("plain position", out, maxStream)
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
		b = append(b, byte(p.Codec))
		b = binary.AppendUvarint(b, uint64(p.Blob))
		b = binary.AppendVarint(b, p.Off-last)
		b = binary.AppendUvarint(b, uint64(p.Len))
		b = binary.AppendUvarint(b, uint64(p.Inner))
		if p.Codec == Deflate {
			b = binary.AppendUvarint(b, uint64(p.Point))
		}
		last = p.Off
	}
	return b
}

// readPieces reads at most as many pieces as there are chunks.
func (a *Access) readPieces(p []byte, chunks int) error {
	r := reader{b: p}
	n := r.limited("number of pieces", int64(min(chunks, len(p)/5)))
	if n > 0 {
		a.Pieces = make([]Piece, n)
	}
	last := int64(0)
	for i := range a.Pieces {
		x := Piece{Codec: Codec(r.u8()), Blob: uint16(r.limited("blob", maxBlobs))}
		x.Off = r.moved("offset", last, maxBlob)
		x.Len, x.Inner = r.limited("length", maxBlob), r.limited("inner offset", maxStream)
		if x.Codec == Deflate {
			x.Point = uint32(r.limited("checkpoint", maxPoint))
		}
		a.Pieces[i], last = x, x.Off
	}
	return r.end()
}

// appendSpans writes each span's distance from the start of the one before.
func appendSpans(b []byte, spans []Span) []byte {
	b = binary.AppendUvarint(b, uint64(len(spans)))
	last := int64(0)
	for _, s := range spans {
		b = binary.AppendUvarint(b, uint64(s.Off-last))
		b = binary.AppendUvarint(b, uint64(s.Len))
		b = append(b, s.Sum[:]...)
		last = s.Off
	}
	return b
}

func (a *Access) readSpans(p []byte) error {
	r := reader{b: p}
	n := r.limited("number of spans", min(maxSpans, int64(len(p)/minChunk)))
	if n > 0 {
		a.Spans = make([]Span, n)
	}
	last := int64(0)
	for i := range a.Spans {
		s := &a.Spans[i]
		s.Off = last + r.limited("offset", maxBlob-last)
		s.Len = r.limited("length", maxBlob)
		copy(s.Sum[:], r.take(uint64(len(Sum{}))))
		last = s.Off
	}
	return r.end()
}

func appendRanges(b []byte, ranges []Range) []byte {
	b = binary.AppendUvarint(b, uint64(len(ranges)))
	end := int64(0)
	for _, x := range ranges {
		b = binary.AppendVarint(b, x.Off-end)
		b = binary.AppendUvarint(b, uint64(x.Len))
		end = x.Off + x.Len
	}
	return b
}

func readRanges(p []byte) ([]Range, error) {
	r := reader{b: p}
	var ranges []Range
	if n := r.limited("number of ranges", min(maxRanges, int64(len(p)/2))); n > 0 {
		ranges = make([]Range, n)
	}
	end := int64(0)
	for i := range ranges {
		off := r.moved("offset", end, MaxSegment)
		ranges[i] = Range{off, r.limited("length", MaxSegment-off)}
		end = off + ranges[i].Len
	}
	return ranges, r.end()
}
