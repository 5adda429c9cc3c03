package index

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// Every file of this package starts with eight bytes that say what it is, then
// version and flags, 16 bits each. Readers refuse what they do not know.
const (
	magicTable   = "TtmTable"
	magicLayer   = "TtmLayer"
	magicImage   = "TtmImage"
	tableVersion = 1
	layerVersion = 2
	imageVersion = 2
	headerSize   = 12
)

// errShort means that a field reaches behind the end of what holds it.
var errShort = errors.New("ends too early")

// invalid says that the data, not the program, is at fault.
func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func appendHeader(b []byte, magic string, version, flags uint16) []byte {
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint16(b, version)
	return binary.LittleEndian.AppendUint16(b, flags)
}

// appendString writes a length and that many bytes.
func appendString[S ~string | ~[]byte](b []byte, s S) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// reader takes fields off the front of b. The first failure stays in err and
// makes every later field zero, so that callers check once per record.
type reader struct {
	b    []byte
	text string // the same bytes as b when strings are to share its memory
	off  int
	err  error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) left() int { return len(r.b) - r.off }

// take returns the next n bytes, without a copy.
func (r *reader) take(n uint64) []byte {
	if r.err == nil && n > uint64(r.left()) {
		r.fail(errShort)
	}
	if r.err != nil {
		return nil
	}
	p := r.b[r.off : r.off+int(n) : r.off+int(n)]
	r.off += int(n)
	return p
}

func (r *reader) u8() uint8 {
	if p := r.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if p := r.take(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if p := r.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if p := r.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

// uvarint refuses numbers that are written longer than need be: one value has
// one encoding, which is what makes the digest of a table its name.
func (r *reader) uvarint() uint64 {
	if r.err != nil {
		return 0
	}
	v, n := binary.Uvarint(r.b[r.off:])
	switch {
	case n == 0:
		r.fail(errShort)
		return 0
	case n < 0:
		r.fail(errors.New("number longer than 64 bits"))
		return 0
	case n > 1 && r.b[r.off+n-1] == 0:
		r.fail(errors.New("number with needless zero bytes"))
		return 0
	}
	r.off += n
	return v
}

func (r *reader) varint() int64 {
	u := r.uvarint()
	return int64(u>>1) ^ -int64(u&1)
}

// limited reads a number that may be at most limit; what names it in errors.
func (r *reader) limited(what string, limit int64) int64 {
	v := r.uvarint()
	if v > uint64(limit) {
		r.fail(fmt.Errorf("%s %d is over %d", what, v, limit))
		return 0
	}
	return int64(v)
}

// moved reads a distance and returns the position that far from, which lies in
// [0, limit]; what names it in errors.
func (r *reader) moved(what string, from, limit int64) int64 {
	d := r.varint()
	if d < -from || d > limit-from {
		r.fail(fmt.Errorf("%s %d%+d is not in [0, %d]", what, from, d, limit))
		return 0
	}
	return from + d
}

// str reads a length and that many bytes as a string.
func (r *reader) str() string {
	p := r.take(r.uvarint())
	if r.text != "" {
		return r.text[r.off-len(p) : r.off]
	}
	return string(p)
}

// header checks magic and version, and returns the flags, which may be at most
// limit.
func (r *reader) header(magic string, version, limit uint16) uint16 {
	if got := r.take(8); r.err == nil && string(got) != magic {
		r.fail(fmt.Errorf("magic %q is not %q", got, magic))
	}
	if v := r.u16(); r.err == nil && v != version {
		r.fail(fmt.Errorf("version %d is not known, only %d", v, version))
	}
	flags := r.u16()
	if r.err == nil && flags > limit {
		r.fail(fmt.Errorf("unknown flags %#x", flags))
	}
	return flags
}

// end checks that nothing is left over and gives the first error.
func (r *reader) end() error {
	if r.err == nil && r.left() > 0 {
		r.fail(fmt.Errorf("%d bytes too many", r.left()))
	}
	return r.err
}
