package index

import "fmt"

// Limits that keep sums of offsets far from overflow, in bytes.
const (
	maxBlob   = 1 << 50
	maxStream = 1 << 56 // of an uncompressed tar
)

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
	a := &l.Access
	switch {
	case a.Format < Tar || a.Format > Members:
		return invalid("unknown format %d", a.Format)
	case a.Format != Gzip && len(a.Checkpoints) > 0:
		return invalid("checkpoints in a blob that is not gzip")
	case a.Format == Members && len(a.Extents) > 0:
		return invalid("extents in a blob of members")
	case a.Format == Members && len(a.Pieces) != len(l.Table.Chunks):
		return invalid("%d pieces for %d chunks", len(a.Pieces), len(l.Table.Chunks))
	case a.Format != Members && len(a.Pieces) > 0:
		return invalid("pieces in a blob that is not made of members")
	}
	if err := l.checkExtents(); err != nil {
		return err
	}
	if err := l.checkCheckpoints(); err != nil {
		return err
	}
	for i, p := range a.Pieces {
		if p.Len < 1 || p.Off < 0 || p.Off > l.BlobSize-p.Len || p.Inner < 0 || p.Inner > maxStream {
			return invalid("piece %d at %d, %d bytes, inner offset %d, is not within a blob of %d", i, p.Off, p.Len, p.Inner, l.BlobSize)
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
		if c.Bit <= last.Bit || c.Bit > l.BlobSize*8 || c.Out < last.Out || c.Out > maxStream {
			return invalid("checkpoint %d at bit %d, plain offset %d, is out of range or order", i, c.Bit, c.Out)
		}
		if len(c.Window) > MaxWindow || int64(len(c.Window)) > c.Out {
			return invalid("checkpoint %d has a window of %d bytes at plain offset %d", i, len(c.Window), c.Out)
		}
		last = c
	}
	return nil
}
