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
	// maxRequest is more than most requests have, which is at most two names of
	// 255 bytes; the others are in fileOps.
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
	opReadlink    = 5
	opSymlink     = 6
	opRead        = 15
	opWrite       = 16
	opFsync       = 20
	opSetxattr    = 21
	opGetxattr    = 22
	opListxattr   = 23
	opFlush       = 25
	opInit        = 26
	opReaddir     = 28
	opFsyncdir    = 30
	opAccess      = 34
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42
	opReaddirplus = 44
	opSyncfs      = 50
)

// kind is what becomes of a request for an image, or for a directory of the tree.
type kind int

const (
	refused  kind = iota // see imageErrno
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
	opReaddirplus: metadata,
	opDestroy:     metadata,
	opRead:        data,
	opForget:      unheard, opInterrupt: unheard, opBatchForget: unheard,
	// SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE
	4: readOnly, 6: readOnly, 8: readOnly, 9: readOnly, 10: readOnly, 11: readOnly, 12: readOnly, 13: readOnly, 16: readOnly,
	// SETXATTR, REMOVEXATTR, CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE, TMPFILE
	21: readOnly, 24: readOnly, 35: readOnly, 43: readOnly, 45: readOnly, 47: readOnly, 51: readOnly,
}

// imageErrno answers what is refused. A device of images only says ENOSYS, which
// Linux remembers and never asks again. Beside other subtrees that would be wrong.
func imageErrno(opcode uint32, mixed, xattr bool) syscall.Errno {
	switch opcode {
	case opGetxattr, opListxattr:
		if !xattr {
			return syscall.ENOSYS
		}
	}
	if !mixed {
		return syscall.ENOSYS
	}
	switch opcode {
	case opFlush, opFsync, opFsyncdir, opAccess, opSyncfs:
		return 0
	}
	if _, known := fileOps[opcode]; known {
		return syscall.EOPNOTSUPP
	}
	return syscall.ENOSYS
}

// request is a private copy of a request's beginning, with what is needed of it.
type request struct {
	msg    []byte // at most maxRequest bytes
	total  int64  // bytes of all of it
	kind   kind
	opcode uint32
	unique uint64
	node   uint64
	sub    *mounted // of node; nil for a directory of the tree, and for nothing
}

// parseRequest looks at the copy of a request of total bytes; false when it is too
// short to be answered at all.
func parseRequest(msg []byte, total int64) (request, bool) {
	if len(msg) < inHeaderSize {
		return request{}, false
	}
	le := binary.LittleEndian
	r := request{msg: msg, total: total, opcode: le.Uint32(msg[4:]), unique: le.Uint64(msg[8:]), node: le.Uint64(msg[16:])}
	r.kind = kinds[r.opcode]
	// The header's word for the length counts for nothing: go-fuse goes by msg.
	if total > maxRequest && (r.kind == metadata || r.kind == data) {
		r.kind = refused
	}
	return r, true
}

// pollName and pollNode are a file that go-fuse answers for by itself (its
// fuse/poll.go). It must see neither.
const (
	pollName = ".go-fuse-epoll-hack"
	pollNode = ^uint64(0)
)

// check finds what go-fuse must not see, and bounds what it may answer; OK is 0.
func (r *request) check() syscall.Errno {
	if r.node == pollNode {
		return syscall.ESTALE
	}
	if r.node == fuse.FUSE_ROOT_ID && bytes.Contains(r.msg[inHeaderSize:], []byte(pollName)) {
		return syscall.ENOENT // whatever is asked, and however the name goes on
	}
	switch r.opcode {
	case opLookup:
		if _, ok := r.name(); !ok {
			return syscall.ENOENT
		}
	case opReaddir, opReaddirplus:
		return r.bound(readSize, maxReaddir)
	case opGetxattr, opListxattr:
		return r.bound(inHeaderSize, maxXAttr)
	}
	return 0
}

// name is that of a LOOKUP.
func (r *request) name() (string, bool) {
	name, _, ok := bytes.Cut(r.msg[inHeaderSize:], []byte{0})
	return string(name), ok
}

// bound makes the number at that place of the request at most n.
func (r *request) bound(at, n int) syscall.Errno {
	if len(r.msg) < at+8 {
		return syscall.EINVAL
	}
	le := binary.LittleEndian
	le.PutUint32(r.msg[at:], min(le.Uint32(r.msg[at:]), uint32(n)))
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
