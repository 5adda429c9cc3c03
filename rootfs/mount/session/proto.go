package session

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
)

// Parts of the FUSE wire protocol (include/uapi/linux/fuse.h) that a session
// needs without any filesystem behind it.
const (
	inHeaderSize  = 40
	outHeaderSize = 16
	initOutSize   = 64

	opForget      = 2
	opInit        = 26
	opInterrupt   = 36
	opBatchForget = 42

	notifyResend = 7 // code of a notification that asks for unanswered requests again

	flagAsyncRead   = 1 << 0
	flagAsyncDIO    = 1 << 15 // many direct reads in flight; a loop device has a queue depth of 1 without it
	flagParallelDir = 1 << 18
	flagMaxPages    = 1 << 22
	flagHasResend   = 1 << (39 - 32) // in flags2

	protoMajor = 7
	// protoMinor is the newest protocol whose request layouts a worker reads.
	protoMinor = 40
)

// Sizes that are settled with the kernel once, for the life of a session.
const (
	// MaxRead is the largest read in bytes that the kernel may send.
	MaxRead = 1 << 20
	// maxWrite is what the kernel takes for a minimum; images are read-only.
	// It is small because a read buffer must hold a write with its header.
	maxWrite = 4096
	// BufferSize is what a buffer for one request must hold: the kernel's
	// FUSE_MIN_READ_BUFFER, which is more than maxWrite and its header.
	BufferSize = 8192
	// MaxBackground is how many asynchronous reads the kernel keeps in flight.
	MaxBackground = 128
)

type header struct {
	opcode uint32
	unique uint64
}

// parseHeader reads the start of a request that the kernel (or the supervisor,
// in journal mode) sent.
func parseHeader(msg []byte) (header, error) {
	if len(msg) < inHeaderSize {
		return header{}, fmt.Errorf("request of %d bytes is shorter than its header: %w", len(msg), errdefs.ErrDataLoss)
	}
	return header{
		opcode: binary.NativeEndian.Uint32(msg[4:]),
		unique: binary.NativeEndian.Uint64(msg[8:]),
	}, nil
}

// initRequest is the kernel's INIT: what it offers.
type initRequest struct {
	header
	minor        uint32
	maxReadahead uint32
	flags        uint32
	flags2       uint32 // 0 from kernels that do not send it
}

func parseInit(msg []byte) (initRequest, error) {
	h, err := parseHeader(msg)
	if err != nil {
		return initRequest{}, err
	}
	if h.opcode != opInit || len(msg) < inHeaderSize+16 {
		return initRequest{}, fmt.Errorf("first request is opcode %d with %d bytes, not INIT: %w", h.opcode, len(msg), errdefs.ErrFailedPrecondition)
	}
	arg := msg[inHeaderSize:]
	word := func(i int) uint32 { return binary.NativeEndian.Uint32(arg[4*i:]) }
	if word(0) != protoMajor {
		return initRequest{}, fmt.Errorf("kernel speaks FUSE %d.%d, not 7.x: %w", word(0), word(1), errdefs.ErrNotImplemented)
	}
	r := initRequest{header: h, minor: word(1), maxReadahead: word(2), flags: word(3)}
	if len(arg) >= 20 {
		r.flags2 = word(4)
	}
	return r, nil
}

func (r initRequest) canResend() bool { return r.flags2&flagHasResend != 0 }

// reply accepts of the kernel's offer only what a read-only file server needs.
// Passthrough stays off: with it the kernel counts the mount as stacked and
// refuses to mount EROFS on its files.
func (r initRequest) reply() []byte {
	b := make([]byte, outHeaderSize+initOutSize)
	binary.NativeEndian.PutUint32(b[0:], uint32(len(b)))
	binary.NativeEndian.PutUint64(b[8:], r.unique)
	out := b[outHeaderSize:]
	binary.NativeEndian.PutUint32(out[0:], protoMajor)
	binary.NativeEndian.PutUint32(out[4:], min(r.minor, protoMinor))
	binary.NativeEndian.PutUint32(out[8:], r.maxReadahead)
	binary.NativeEndian.PutUint32(out[12:], r.flags&(flagAsyncRead|flagAsyncDIO|flagParallelDir|flagMaxPages))
	binary.NativeEndian.PutUint16(out[16:], MaxBackground)
	binary.NativeEndian.PutUint16(out[18:], MaxBackground*3/4)
	binary.NativeEndian.PutUint32(out[20:], maxWrite)
	binary.NativeEndian.PutUint32(out[24:], 1) // time granularity, ns
	binary.NativeEndian.PutUint16(out[28:], MaxRead/4096)
	return b
}

// resendNotice is FUSE_NOTIFY_RESEND: a reply with unique 0 whose error field
// holds the code.
func resendNotice() []byte {
	b := make([]byte, outHeaderSize)
	binary.NativeEndian.PutUint32(b[0:], outHeaderSize)
	binary.NativeEndian.PutUint32(b[4:], notifyResend)
	return b
}
