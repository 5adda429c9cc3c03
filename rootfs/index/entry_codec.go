package index

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// minEntry is what an entry takes in its section at least, in bytes; it bounds
// the memory that a claimed number of entries can ask for.
const minEntry = 8

// appendEntries writes a count and the entries. Paths are written in full: the
// section is compressed, and a reader can then share one string among all.
func appendEntries(b []byte, entries []Entry) []byte {
	b = binary.AppendUvarint(b, uint64(len(entries)))
	var layout Layout
	for i := range entries {
		b = appendEntry(b, &entries[i], &layout)
	}
	return b
}

func appendEntry(b []byte, e *Entry, layout *Layout) []byte {
	b = append(b, byte(e.Kind))
	b = appendString(b, e.Path)
	b = binary.AppendUvarint(b, uint64(e.Mode))
	b = binary.AppendUvarint(b, uint64(e.UID))
	b = binary.AppendUvarint(b, uint64(e.GID))
	b = binary.AppendVarint(b, e.Sec)
	b = binary.AppendUvarint(b, uint64(e.Nsec))
	switch e.Kind {
	case File:
		b = binary.AppendUvarint(b, uint64(e.Size))
		// Almost always zero: files lie where Layout puts them.
		b = binary.AppendVarint(b, (e.Off-layout.Place(e.Size))/BlockSize)
	case Symlink, Hardlink:
		b = appendString(b, e.Link)
	case Char, Block:
		b = binary.AppendUvarint(b, uint64(e.Major))
		b = binary.AppendUvarint(b, uint64(e.Minor))
	}
	b = binary.AppendUvarint(b, uint64(len(e.Xattrs)))
	for _, x := range e.Xattrs {
		b = appendString(b, x.Name)
		b = appendString(b, x.Value)
	}
	return b
}

// readEntries reads the entries of a layer whose segment has the given size in
// bytes, and checks each.
func readEntries(section []byte, segment int64) ([]Entry, error) {
	r := reader{b: section, text: string(section)}
	n := r.limited("number of entries", min(MaxEntries, int64(len(section)/minEntry)))
	if r.err != nil || n == 0 {
		return nil, r.end()
	}
	entries := make([]Entry, n)
	var layout Layout
	for i := range entries {
		e := &entries[i]
		r.entry(e, &layout)
		if err := r.err; err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if err := e.Validate(segment); err != nil {
			return nil, fmt.Errorf("entry %d, %.200q: %w", i, e.Path, err)
		}
	}
	return entries, r.end()
}

func (r *reader) entry(e *Entry, layout *Layout) {
	e.Kind = Kind(r.u8())
	e.Path = r.str()
	e.Mode = uint16(r.limited("mode", 0o7777))
	e.UID = uint32(r.limited("user", 1<<32-1))
	e.GID = uint32(r.limited("group", 1<<32-1))
	e.Sec = r.varint()
	e.Nsec = uint32(r.limited("nanoseconds", 1e9-1))
	switch e.Kind {
	case File:
		e.Size = r.limited("size", MaxSegment)
		e.Off = r.place(e.Size, layout)
	case Symlink, Hardlink:
		e.Link = r.str()
	case Char, Block:
		e.Major = uint32(r.limited("major number", maxMajor))
		e.Minor = uint32(r.limited("minor number", maxMinor))
	}
	e.Xattrs = r.xattrs()
}

// place reads how many blocks a file lies away from where Layout would put it.
func (r *reader) place(size int64, layout *Layout) int64 {
	if layout.Size() > MaxSegment-size {
		r.fail(errors.New("files are larger than a segment can be"))
		return 0
	}
	moved := r.varint()
	if moved < -MaxSegment/BlockSize || moved > MaxSegment/BlockSize {
		r.fail(fmt.Errorf("file %d blocks away", moved))
		return 0
	}
	return layout.Place(size) + moved*BlockSize
}

func (r *reader) xattrs() []Xattr {
	n := r.limited("number of extended attributes", int64(r.left()/2))
	if r.err != nil || n == 0 {
		return nil
	}
	// Grown by appending: n is bounded by the whole section, not by what this
	// entry really holds.
	x := make([]Xattr, 0, min(n, 8))
	for range n {
		if r.err != nil {
			return nil
		}
		name := r.str()
		x = append(x, Xattr{Name: name, Value: r.str()})
	}
	return x
}
