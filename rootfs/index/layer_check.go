package index

import "fmt"

// Limits that keep sums of offsets far from overflow, in bytes.
const (
	maxBlob   = 1 << 50
	maxStream = 1 << 56  // of an uncompressed tar
	maxSpan   = 64 << 20 // that have one digest, and are read for one byte of them
)

// Limits of numbers of things.
const (
	maxBlobs = 4096
	maxPoint = 1<<32 - 1
	// What a layer file says in a few bytes takes tens in memory. No layer comes
	// near these.
	maxExtents     = 8 << 20
	maxCheckpoints = 1 << 20
	maxSpans       = 1 << 20
	maxRanges      = MaxPrefetch
)

// MaxPrefetch bounds the ranges of a Layer.Prefetch.
const MaxPrefetch = 16 << 10

// Validate checks all that the type and its parts promise: digests, bounds,
// order. Errors name the entry.
func (l *Layer) Validate() error {
	if err := l.checkIdentity(); err != nil {
		return err
	}
	if err := l.Table.Validate(); err != nil {
		return fmt.Errorf("table: %w", err)
	}
	if len(l.Entries) > MaxEntries {
		return invalid("%d entries are over %d", len(l.Entries), MaxEntries)
	}
	for i := range l.Entries {
		if err := l.Entries[i].Validate(l.Table.Size); err != nil {
			return fmt.Errorf("entry %.200q: %w", l.Entries[i].Path, err)
		}
	}
	if err := checkRanges(l.Prefetch, l.Table.Size); err != nil {
		return err
	}
	return l.checkAccess()
}

func (l *Layer) checkIdentity() error {
	if err := l.Blob.Validate(); err != nil {
		return invalid("blob digest %.80q: %w", l.Blob, err)
	}
	if l.BlobSize < 0 || l.BlobSize > maxBlob {
		return invalid("blob size %d", l.BlobSize)
	}
	if l.DiffID != "" {
		if err := l.DiffID.Validate(); err != nil {
			return invalid("diff ID %.80q: %w", l.DiffID, err)
		}
	}
	return nil
}

func (l *Layer) checkAccess() error {
	if err := l.checkFormat(); err != nil {
		return err
	}
	for _, check := range []func() error{l.checkBlobs, l.checkExtents, l.checkCheckpoints, l.checkPieces, l.checkSpans} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// checkFormat checks that the layer has what its format needs and nothing else.
func (l *Layer) checkFormat() error {
	a := &l.Access
	switch {
	case a.Format < Tar || a.Format > Chunked:
		return invalid("unknown format %d", a.Format)
	case len(a.Extents) > maxExtents || len(a.Checkpoints) > maxCheckpoints || len(a.Spans) > maxSpans:
		return invalid("%d extents, %d checkpoints, %d spans are over %d, %d, %d",
			len(a.Extents), len(a.Checkpoints), len(a.Spans), maxExtents, maxCheckpoints, maxSpans)
	case a.Format == Tar && len(a.Checkpoints) > 0:
		return invalid("checkpoints in a blob that is not compressed")
	case a.Format == Chunked && (len(a.Extents) > 0 || len(a.Spans) > 0 || len(l.Skeleton) > 0):
		return invalid("extents, spans or a skeleton in a blob of pieces")
	case a.Format == Chunked && len(a.Pieces) != len(l.Table.Chunks):
		return invalid("%d pieces for %d chunks", len(a.Pieces), len(l.Table.Chunks))
	case a.Format != Chunked && (len(a.Pieces) > 0 || len(a.Blobs) > 0):
		return invalid("pieces or further blobs in a blob that is read as a stream")
	case (l.Table.Algorithm == Vouched) != (len(a.Spans) > 0):
		return invalid("%d spans for sums of algorithm %d", len(a.Spans), l.Table.Algorithm)
	}
	return nil
}

func (l *Layer) checkBlobs() error {
	if len(l.Access.Blobs) > maxBlobs {
		return invalid("%d blobs are over %d", len(l.Access.Blobs), maxBlobs)
	}
	for i, b := range l.Access.Blobs {
		if err := b.Digest.Validate(); err != nil {
			return invalid("digest %.80q of blob %d: %w", b.Digest, i+1, err)
		}
		if b.Size < 0 || b.Size > maxBlob {
			return invalid("size %d of blob %d", b.Size, i+1)
		}
	}
	return nil
}

// within says whether the extent is sound, given the sizes of segment and
// stream in bytes.
func (e Extent) within(segment, stream int64) bool {
	return e.Len >= 1 && e.Seg >= 0 && e.Seg <= segment-e.Len && e.Tar >= 0 && e.Tar <= stream-e.Len
}

func (l *Layer) checkExtents() error {
	stream := int64(maxStream)
	if l.Access.Format == Tar {
		stream = l.BlobSize
	}
	end := int64(0)
	for i, e := range l.Access.Extents {
		if !e.within(l.Table.Size, stream) || e.Seg < end {
			return invalid("extent %d at %d, %d bytes from %d of the stream, is out of range or order", i, e.Seg, e.Len, e.Tar)
		}
		end = e.Seg + e.Len
	}
	return nil
}

func (l *Layer) checkCheckpoints() error {
	last := Checkpoint{Bit: -1}
	for i, c := range l.Access.Checkpoints {
		ordered := l.Access.Format == Chunked || c.Bit > last.Bit && c.Bit <= l.BlobSize*8 && c.Out >= last.Out
		if !ordered || c.Bit < 0 || c.Bit > maxBlob*8 || c.Out < 0 || c.Out > maxStream {
			return invalid("checkpoint %d at bit %d, plain offset %d, is out of range or order", i, c.Bit, c.Out)
		}
		if len(c.Window) > MaxWindow || int64(len(c.Window)) > c.Out {
			return invalid("checkpoint %d has a window of %d bytes at plain offset %d", i, len(c.Window), c.Out)
		}
		if l.Access.Format == Zstd && (c.Bit%8 != 0 || len(c.Window) > 0) {
			return invalid("checkpoint %d is not the start of a frame", i)
		}
		last = c
	}
	return nil
}

func (l *Layer) checkPieces() error {
	for i, p := range l.Access.Pieces {
		size, ok := l.pieceBlob(p)
		if !ok || p.Codec > Deflate {
			return invalid("piece %d is in blob %d with codec %d, which are not known", i, p.Blob, p.Codec)
		}
		if p.Len < 1 || p.Off < 0 || p.Off > size-p.Len || p.Inner < 0 || p.Inner > maxStream {
			return invalid("piece %d at %d, %d bytes, inner offset %d, is not within a blob of %d", i, p.Off, p.Len, p.Inner, size)
		}
		if err := l.checkPoint(p); err != nil {
			return fmt.Errorf("piece %d: %w", i, err)
		}
	}
	return nil
}

// pieceBlob is the size of the blob that a piece is in, in bytes.
func (l *Layer) pieceBlob(p Piece) (int64, bool) {
	if p.Blob == 0 {
		return l.BlobSize, true
	}
	if int(p.Blob) > len(l.Access.Blobs) {
		return 0, false
	}
	return l.Access.Blobs[p.Blob-1].Size, true
}

// checkPoint checks that a piece names a checkpoint if it needs one.
func (l *Layer) checkPoint(p Piece) error {
	points := l.Access.Checkpoints
	switch {
	case p.Codec != Deflate && p.Point != 0:
		return invalid("a checkpoint for codec %d", p.Codec)
	case p.Codec == Deflate && (int64(p.Point) >= int64(len(points)) || points[p.Point].Bit/8 != p.Off):
		return invalid("no checkpoint %d at byte %d", p.Point, p.Off)
	}
	return nil
}

func (l *Layer) checkSpans() error {
	var last Span
	for i, s := range l.Access.Spans {
		if s.Len < 1 || s.Len > maxSpan || s.Off < 0 || s.Off > l.BlobSize-s.Len || i > 0 && (s.Off <= last.Off || s.End() <= last.End()) {
			return invalid("span %d at %d, %d bytes, is out of range or order", i, s.Off, s.Len)
		}
		last = s
	}
	return nil
}

// checkRanges checks ranges of a segment of the given size in bytes.
func checkRanges(ranges []Range, segment int64) error {
	if len(ranges) > maxRanges {
		return invalid("%d ranges to be prefetched are over %d", len(ranges), maxRanges)
	}
	for i, r := range ranges {
		if r.Off < 0 || r.Len < 1 || r.Off > segment-r.Len {
			return invalid("range %d at %d, %d bytes, to be prefetched is not within a segment of %d", i, r.Off, r.Len, segment)
		}
	}
	return nil
}
