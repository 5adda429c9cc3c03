package index

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Limits of an image.
const (
	MaxBootstrap = 4 << 30  // bytes
	MaxSegments  = 4096     // segments
	MaxImage     = 16 << 40 // bytes: what 32-bit block addresses reach
)

// EncodeImage encodes an image's bootstrap and tables; the same image gives
// the same bytes. The image is checked first: see Image.Validate.
func EncodeImage(i *Image) ([]byte, error) {
	p, err := newPacker()
	if err != nil {
		return nil, fmt.Errorf("encode index of %s: %w", i.Manifest, err)
	}
	if err := i.checkLayout(); err != nil {
		return nil, fmt.Errorf("encode index of %s: %w", i.Manifest, err)
	}
	b := appendHeader(nil, magicImage, imageVersion, 0)
	b = p.section(b, appendImageMeta(nil, i))
	b = p.section(b, i.Bootstrap)
	for n := range i.Segments {
		s := &i.Segments[n]
		table := EncodeTable(s.Table)
		if err := s.check(table); err != nil {
			return nil, fmt.Errorf("encode index of %s: %w", i.Manifest, err)
		}
		b = p.section(b, table)
		b = p.section(b, appendRanges(nil, s.Prefetch))
	}
	return b, nil
}

// DecodeImage reads what EncodeImage wrote and checks it as Image.Validate
// does. The bytes may come from anywhere; that the index belongs to the
// manifest it names is for the caller to know. The image may share b's memory.
func DecodeImage(b []byte) (*Image, error) {
	u, err := newUnpacker()
	if err != nil {
		return nil, fmt.Errorf("decode index: %w", err)
	}
	defer u.close()
	r := reader{b: b}
	r.header(magicImage, imageVersion, 0)
	i := new(Image)
	r.part(u, "metadata", maxMeta, i.readMeta)
	r.part(u, "bootstrap", MaxBootstrap, func(p []byte) error {
		i.Bootstrap = p
		return nil
	})
	for n := range i.Segments {
		s := &i.Segments[n]
		r.part(u, fmt.Sprintf("table %d", n), maxTable, s.readTable)
		r.part(u, fmt.Sprintf("prefetch %d", n), maxMeta, func(p []byte) (err error) {
			s.Prefetch, err = readRanges(p)
			return err
		})
	}
	if err := r.end(); err != nil {
		return nil, invalid("decode index: %w", err)
	}
	if err := i.checkLayout(); err != nil {
		return nil, fmt.Errorf("decode index: %w", err)
	}
	return i, nil
}

func appendImageMeta(b []byte, i *Image) []byte {
	b = appendString(b, i.Manifest)
	b = binary.AppendUvarint(b, uint64(len(i.Segments)))
	for _, s := range i.Segments {
		b = appendString(b, s.ID)
		b = appendString(b, s.Layer)
		b = binary.AppendUvarint(b, uint64(s.Off))
	}
	return b
}

func (i *Image) readMeta(p []byte) error {
	r := reader{b: p}
	i.Manifest = digest.Digest(r.str())
	n := r.limited("number of segments", MaxSegments)
	if n > 0 {
		i.Segments = make([]Segment, n)
	}
	for k := range i.Segments {
		id := digest.Digest(r.str())
		layer := digest.Digest(r.str())
		i.Segments[k] = Segment{ID: id, Layer: layer, Off: r.limited("offset", MaxImage)}
	}
	return r.end()
}

func (s *Segment) readTable(encoded []byte) (err error) {
	if s.Table, err = DecodeTable(encoded); err != nil {
		return err
	}
	return s.check(encoded)
}

// check compares a segment's name with its encoded table.
func (s *Segment) check(encoded []byte) error {
	if err := s.Table.Validate(); err != nil {
		return fmt.Errorf("segment %s: %w", s.ID, err)
	}
	if got := digest.FromBytes(encoded); got != s.ID {
		return invalid("segment %s has a table with the digest %s", s.ID, got)
	}
	return nil
}

// Validate checks all that the type and its parts promise: digests, each
// segment's name against its table, that nothing overlaps or leaves a gap.
func (i *Image) Validate() error {
	if err := i.checkLayout(); err != nil {
		return err
	}
	for n := range i.Segments {
		if err := i.Segments[n].check(EncodeTable(i.Segments[n].Table)); err != nil {
			return err
		}
	}
	return nil
}

func (i *Image) checkLayout() error {
	if err := i.Manifest.Validate(); err != nil {
		return invalid("manifest digest %.80q: %w", i.Manifest, err)
	}
	n := len(i.Bootstrap)
	if n == 0 || n%BlockSize != 0 || int64(n) > MaxBootstrap {
		return invalid("bootstrap of %d bytes is not whole blocks up to %d", n, int64(MaxBootstrap))
	}
	if len(i.Segments) > MaxSegments {
		return invalid("%d segments are over %d", len(i.Segments), MaxSegments)
	}
	end, seen := int64(n), make(map[ID]bool, len(i.Segments))
	for k := range i.Segments {
		s := &i.Segments[k]
		if err := s.checkPlace(end); err != nil {
			return fmt.Errorf("segment %d: %w", k, err)
		}
		if err := checkRanges(s.Prefetch, s.Table.Size); err != nil {
			return fmt.Errorf("segment %d: %w", k, err)
		}
		if seen[s.ID] {
			return invalid("segment %s occurs twice", s.ID)
		}
		seen[s.ID], end = true, s.End()
	}
	return nil
}

// checkPlace checks a segment that has to start at the offset end.
func (s *Segment) checkPlace(end int64) error {
	if err := errors.Join(s.ID.Validate(), s.Layer.Validate()); err != nil {
		return invalid("%w", err)
	}
	switch {
	case s.Table == nil:
		return invalid("%s has no table", s.ID)
	case s.Off != end:
		return invalid("%s is at %d and not at %d", s.ID, s.Off, end)
	case s.Table.Size < BlockSize || s.Table.Size > MaxImage-s.Off:
		return invalid("%s at %d has %d bytes", s.ID, s.Off, s.Table.Size)
	}
	return nil
}
