package zstd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// MaxWindow is how far back a frame may refer, in bytes: what zstd needs no
// option for to decode, and compresses with --long=27. Decoding takes about
// as much memory.
const MaxWindow = 128 << 20

// Magic numbers of frames (RFC 8878, sections 3.1.1 and 3.1.2). The last four
// bits of a skippable frame's are free.
const (
	frameMagic     = 0xfd2fb528
	skippableMagic = 0x184d2a50
	skippableMask  = 0xfffffff0
)

const (
	inputSize = 64 << 10 // compressed bytes that are buffered
	magicSize = 4
	skipSize  = 8 // header of a skippable frame
	blockSize = 3 // header of a block
	sumSize   = 4 // checksum behind the last block
	typeRLE   = 1 // a block of one byte, repeated
)

// IsZstd tells from the first bytes of a blob whether it is one to decode.
func IsZstd(head []byte) bool {
	if len(head) < magicSize {
		return false
	}
	magic := binary.LittleEndian.Uint32(head)
	return magic == frameMagic || magic&skippableMask == skippableMagic
}

// frames splits a blob into its frames. Read delivers one of them, with its
// header, and then io.EOF; next goes on to the one behind it.
type frames struct {
	src    *bufio.Reader
	pos    int64 // of the next byte in the blob
	left   int64 // bytes of the frame to pass on before the next block's header
	sum    bool  // a checksum follows the last block
	inside bool  // more blocks follow
	err    error // what is wrong with the blob, or what its source failed with; sticky
}

// reset starts with a source whose first byte is at offset pos of the blob.
func (f *frames) reset(src io.Reader, pos int64) {
	if f.src == nil {
		f.src = bufio.NewReaderSize(src, inputSize)
	} else {
		f.src.Reset(src)
	}
	*f = frames{src: f.src, pos: pos}
}

// next goes to the start of the next frame and returns its window in bytes. It
// returns io.EOF when the blob ends instead. Precondition: Read has returned
// io.EOF for the frame before, or there was none.
func (f *frames) next() (window uint64, err error) {
	for {
		b, err := f.src.Peek(magicSize)
		if len(b) == 0 && errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, f.fail(err)
		}
		magic := binary.LittleEndian.Uint32(b)
		switch {
		case magic == frameMagic:
			return f.begin()
		case magic&skippableMask != skippableMagic:
			return 0, f.corrupt("no frame")
		}
		if err := f.skip(); err != nil {
			return 0, err
		}
	}
}

// skip passes over a skippable frame.
func (f *frames) skip() error {
	b, err := f.src.Peek(skipSize)
	if err != nil {
		return f.fail(err)
	}
	n := skipSize + int64(binary.LittleEndian.Uint32(b[magicSize:]))
	k, err := io.CopyN(io.Discard, f.src, n)
	f.pos += k
	if err != nil {
		return f.fail(err)
	}
	return nil
}

// begin reads the header of a frame and leaves it to be passed on (section
// 3.1.1.1).
func (f *frames) begin() (window uint64, err error) {
	b, err := f.src.Peek(magicSize + 1)
	if err != nil {
		return 0, f.fail(err)
	}
	h := header(b[magicSize])
	if b, err = f.src.Peek(magicSize + h.size()); err != nil {
		return 0, f.fail(err)
	}
	window = h.window(b[magicSize:])
	if window > MaxWindow {
		return 0, fmt.Errorf("zstd frame at byte %d has a window of %d bytes; compress the layer with one of up to %d (--long=27): %w",
			f.pos, window, MaxWindow, errdefs.ErrInvalidArgument)
	}
	f.left, f.sum, f.inside = int64(len(b)), h.sum(), true
	return window, nil
}

// Read implements io.Reader.
func (f *frames) Read(p []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	if f.left == 0 {
		if !f.inside {
			return 0, io.EOF
		}
		if err := f.block(); err != nil {
			return 0, err
		}
	}
	n, err := f.src.Read(p[:min(int64(len(p)), f.left)])
	f.pos += int64(n)
	f.left -= int64(n)
	if err != nil {
		return n, f.fail(err)
	}
	return n, nil
}

// block reads the header of a block (section 3.1.1.2) and leaves it to be
// passed on.
func (f *frames) block() error {
	b, err := f.src.Peek(blockSize)
	if err != nil {
		return f.fail(err)
	}
	v := uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16
	size := int64(v >> 3)
	if v>>1&3 == typeRLE {
		size = 1
	}
	f.left = blockSize + size
	if v&1 != 0 {
		f.inside = false
		if f.sum {
			f.left += sumSize
		}
	}
	return nil
}

// fail is the error for what the source could not deliver.
func (f *frames) fail(err error) error {
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("zstd data ends at byte %d: %w", f.pos+int64(f.src.Buffered()), io.ErrUnexpectedEOF)
	}
	f.err = err
	return err
}

// corrupt is the error for data that no valid blob has.
func (f *frames) corrupt(what string) error {
	f.err = fmt.Errorf("%s in zstd data at byte %d: %w", what, f.pos, errdefs.ErrDataLoss)
	return f.err
}

// header is the descriptor that a frame's header begins with (section
// 3.1.1.1.1).
type header byte

// single says that the window is the whole content.
func (h header) single() bool { return h&(1<<5) != 0 }

// sum says that a checksum follows the last block.
func (h header) sum() bool { return h&(1<<2) != 0 }

// dictionary is the size of the dictionary's number in bytes.
func (h header) dictionary() int { return [...]int{0, 1, 2, 4}[h&3] }

// content is the size of the field with the content's size in bytes.
func (h header) content() int {
	if n := [...]int{0, 2, 4, 8}[h>>6]; n > 0 || !h.single() {
		return n
	}
	return 1
}

// size of the header in bytes, the descriptor included.
func (h header) size() int {
	n := 1 + h.dictionary() + h.content()
	if !h.single() {
		n++
	}
	return n
}

// window is how far back the frame refers, in bytes. b is the whole header.
func (h header) window(b []byte) uint64 {
	if !h.single() {
		base := uint64(1) << (10 + b[1]>>3)
		return base + base/8*uint64(b[1]&7)
	}
	var v [8]byte
	copy(v[:], b[len(b)-h.content():])
	n := binary.LittleEndian.Uint64(v[:])
	if h.content() == 2 {
		n += 256
	}
	return n
}
