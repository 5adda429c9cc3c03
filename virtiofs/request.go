package virtiofs

import (
	"bytes"
	"encoding/binary"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// What of the wire protocol (include/uapi/linux/fuse.h) is needed to sort requests.
const (
	inHeaderSize  = 40
	outHeaderSize = 16
	// maxRequest is more than any request of the list has, which is LOOKUP with
	// a name of 255 bytes.
	maxRequest = 1024
	// maxReaddir bounds a piece of a listing; a shorter one than was asked for is
	// always allowed.
	maxReaddir = 32 << 10
	// maxRead bounds a read; Linux asks for 256 pages at most (FUSE_MAX_MAX_PAGES).
	maxRead = 1 << 20

	readOffset = inHeaderSize + 8 // in fuse_read_in, behind the header
	readSize   = inHeaderSize + 16
	readEnd    = inHeaderSize + 40
)

const (
	opLookup      = 1
	opForget      = 2
	opRead        = 15
	opInit        = 26
	opReaddir     = 28
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42
)

// kind is what becomes of a request.
type kind int

const (
	refused  kind = iota // ENOSYS, which Linux remembers and never asks again
	readOnly             // EROFS
	unheard              // has no reply, and no effect
	metadata             // go-fuse takes it apart
	data                 // a read, answered here
)

// kinds of the opcodes that are not refused.
var kinds = map[uint32]kind{
	opLookup: metadata, 3: metadata, // GETATTR
	14: metadata, 17: metadata, 18: metadata, // OPEN, STATFS, RELEASE
	opInit: metadata, 27: metadata, opReaddir: metadata, 29: metadata, // OPENDIR, RELEASEDIR
	opDestroy: metadata,
	opRead:    data,
	opForget:  unheard, opInterrupt: unheard, opBatchForget: unheard,
	// SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE
	4: readOnly, 6: readOnly, 8: readOnly, 9: readOnly, 10: readOnly, 11: readOnly, 12: readOnly, 13: readOnly, 16: readOnly,
	// SETXATTR, REMOVEXATTR, CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE, TMPFILE
	21: readOnly, 24: readOnly, 35: readOnly, 43: readOnly, 45: readOnly, 47: readOnly, 51: readOnly,
}

// request is a private copy of a request's beginning, with what is needed of it.
type request struct {
	msg    []byte // at most maxRequest bytes
	kind   kind
	opcode uint32
	unique uint64
	node   uint64
}

// parseRequest looks at the copy of a request of total bytes; false when it is too
// short to be answered at all.
func parseRequest(msg []byte, total int64) (request, bool) {
	if len(msg) < inHeaderSize {
		return request{}, false
	}
	le := binary.LittleEndian
	r := request{msg: msg, opcode: le.Uint32(msg[4:]), unique: le.Uint64(msg[8:]), node: le.Uint64(msg[16:])}
	r.kind = kinds[r.opcode]
	// The header's word for the length counts for nothing: go-fuse goes by msg.
	if total > maxRequest && (r.kind == metadata || r.kind == data) {
		r.kind = refused
	}
	return r, true
}

// check finds what go-fuse must not see; OK is 0.
func (r *request) check(d *Directory) syscall.Errno {
	switch r.opcode {
	case opInit, opDestroy:
		return 0
	case opLookup:
		// go-fuse answers one name that begins with a dot by itself (fuse/poll.go).
		name, _, ok := bytes.Cut(r.msg[inHeaderSize:], []byte{0})
		if !ok || !validName(string(name)) {
			return syscall.ENOENT
		}
	case opReaddir:
		if len(r.msg) < readEnd {
			return syscall.EINVAL
		}
		size := r.msg[readSize:]
		binary.LittleEndian.PutUint32(size, min(binary.LittleEndian.Uint32(size), maxReaddir))
	}
	if r.node != fuse.FUSE_ROOT_ID && d.node(r.node) == nil {
		return syscall.ESTALE
	}
	return 0
}

// readRange is what a READ asks for.
func (r *request) readRange() (off, n int64, errno syscall.Errno) {
	if len(r.msg) < readEnd {
		return 0, 0, syscall.EINVAL
	}
	le := binary.LittleEndian
	off, n = int64(le.Uint64(r.msg[readOffset:])), int64(le.Uint32(r.msg[readSize:]))
	if off < 0 || n > maxRead {
		return 0, 0, syscall.EINVAL
	}
	return off, n, 0
}

// putHeader fills a reply's fuse_out_header; n bytes follow it.
func putHeader(b *[outHeaderSize]byte, unique uint64, errno syscall.Errno, n int) {
	le := binary.LittleEndian
	le.PutUint32(b[0:], uint32(outHeaderSize+n))
	le.PutUint32(b[4:], uint32(-int32(errno)))
	le.PutUint64(b[8:], unique)
}
