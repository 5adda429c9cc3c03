package gzip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/containerd/errdefs"
)

// Flags of a member's header (RFC 1952, section 2.3.1). As in compress/gzip,
// reserved flags are not looked at.
const (
	headerCRC     = 1 << 1
	headerExtra   = 1 << 2
	headerName    = 1 << 3
	headerComment = 1 << 4
)

// maxHeaderString is how long compress/gzip lets a name or comment be, with
// its zero byte.
const maxHeaderString = 512

// IsGzip tells from the first bytes of a blob whether it is one to inflate.
func IsGzip(head []byte) bool {
	return len(head) >= 3 && head[0] == 0x1f && head[1] == 0x8b && head[2] == 8
}

// header reads bytes of a member's header and keeps their checksum.
type header struct {
	in  *input
	crc uint32
}

func (h *header) read(p []byte) error {
	for i := range p {
		v, err := h.in.take(8)
		if err != nil {
			return err
		}
		p[i] = byte(v)
	}
	h.crc = crc32.Update(h.crc, crc32.IEEETable, p)
	return nil
}

// skipString reads up to and including a zero byte.
func (h *header) skipString() error {
	var b [1]byte
	for range maxHeaderString {
		if err := h.read(b[:]); err != nil || b[0] == 0 {
			return err
		}
	}
	return h.in.corrupt("endless string in a header")
}

// skipExtra reads the extra field.
func (h *header) skipExtra() error {
	var b [256]byte
	if err := h.read(b[:2]); err != nil {
		return err
	}
	for n := int(binary.LittleEndian.Uint16(b[:])); n > 0; {
		k := min(n, len(b))
		if err := h.read(b[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// memberHeader reads the header of a member. It returns io.EOF when the blob
// ends instead; anything else there, zeros too, is an error.
func memberHeader(in *input) error {
	if !in.need(8) && (in.err == nil || errors.Is(in.err, io.EOF)) {
		return io.EOF
	}
	h := header{in: in}
	var b [10]byte
	if err := h.read(b[:]); err != nil {
		return err
	}
	if !IsGzip(b[:]) {
		return in.corrupt("no member header")
	}
	flags := b[3]
	if flags&headerExtra != 0 {
		if err := h.skipExtra(); err != nil {
			return err
		}
	}
	for _, f := range [...]byte{headerName, headerComment} {
		if flags&f != 0 {
			if err := h.skipString(); err != nil {
				return err
			}
		}
	}
	if flags&headerCRC == 0 {
		return nil
	}
	crc := h.crc
	if err := h.read(b[:2]); err != nil {
		return err
	}
	if binary.LittleEndian.Uint16(b[:]) != uint16(crc) {
		return in.corrupt("wrong header checksum")
	}
	return nil
}

// sum is the checksum of the member being read.
type sum struct {
	crc, size uint32
	whole     bool // all of the member went through add
}

func (s *sum) add(p []byte) {
	if s.whole {
		s.crc = crc32.Update(s.crc, crc32.IEEETable, p)
		s.size += uint32(len(p))
	}
}

// memberTrailer reads the end of a member and compares it with the checksum.
func memberTrailer(in *input, s *sum) error {
	in.align()
	crc, err := in.take(32)
	if err != nil {
		return err
	}
	size, err := in.take(32)
	if err != nil {
		return err
	}
	if s.whole && (crc != s.crc || size != s.size) {
		return fmt.Errorf("gzip member before byte %d: wrong checksum: %w", in.bit()/8, errdefs.ErrDataLoss)
	}
	return nil
}
