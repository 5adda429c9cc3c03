package gzip

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// inputSize is how much compressed data is buffered, in bytes.
const inputSize = 64 << 10

// input is the compressed stream seen as bits, the least significant first.
type input struct {
	src  io.Reader
	pos  int   // next unread byte of buf
	end  int   // behind the last byte of buf
	base int64 // offset of buf[0] in the blob
	err  error // what src ended with; nil while it may have more

	acc uint64 // bits taken from buf and not used yet; zero above n
	n   uint   // number of bits in acc

	buf [inputSize]byte
}

// reset starts reading src, whose first byte is at offset base of the blob.
func (in *input) reset(src io.Reader, base int64) {
	in.src, in.base, in.err = src, base, nil
	in.pos, in.end = 0, 0
	in.acc, in.n = 0, 0
}

// maxEmptyReads is how many reads without data or error make a source broken.
const maxEmptyReads = 100

// fill makes more bytes available and reports whether there are any.
func (in *input) fill() bool {
	if in.err != nil {
		return in.pos < in.end
	}
	in.base += int64(in.pos)
	in.end = copy(in.buf[:], in.buf[in.pos:in.end])
	in.pos = 0
	for range maxEmptyReads {
		n, err := in.src.Read(in.buf[in.end:])
		in.end += n
		in.err = err
		if n > 0 || err != nil {
			return in.end > 0
		}
	}
	in.err = io.ErrNoProgress
	return in.end > 0
}

// need takes bytes until at least n bits, up to 56, are in acc. It is false
// when the source ends before.
func (in *input) need(n uint) bool {
	for in.n < n {
		if in.pos == in.end && !in.fill() {
			return false
		}
		in.acc |= uint64(in.buf[in.pos]) << in.n
		in.pos++
		in.n += 8
	}
	return true
}

// drop uses up n bits, which must be in acc.
func (in *input) drop(n uint) {
	in.acc >>= n & 63
	in.n -= n
}

// take reads n bits, up to 32.
func (in *input) take(n uint) (uint32, error) {
	if !in.need(n) {
		return 0, in.ended()
	}
	v := uint32(in.acc & (1<<n - 1))
	in.drop(n)
	return v, nil
}

// align drops the rest of the byte that is partly used.
func (in *input) align() { in.drop(in.n & 7) }

// bit is the position of the next unread bit in the blob.
func (in *input) bit() int64 { return (in.base+int64(in.pos))*8 - int64(in.n) }

// ended is the error for a stream that stops too early.
func (in *input) ended() error {
	if in.err != nil && !errors.Is(in.err, io.EOF) {
		return in.err
	}
	return fmt.Errorf("gzip data ends at byte %d: %w", in.base+int64(in.end), io.ErrUnexpectedEOF)
}

// corrupt is the error for data that no valid stream has.
func (in *input) corrupt(what string) error {
	return fmt.Errorf("%s in gzip data near byte %d: %w", what, in.bit()/8, errdefs.ErrDataLoss)
}
