package virtiofs

import (
	"encoding/binary"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
)

const (
	// maxRunning is how many requests of one subtree of Files run at a time: each has
	// a thread, for as long as the node's file system takes.
	maxRunning = 256
	// maxPending is how many such requests of a device there are, with those that
	// wait for their turn; then the queues wait.
	maxPending = 1024
	// fileBytes bounds the memory of those that run.
	fileBytes = 16 << 20

	maxXAttr = 64 << 10 // XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux

	writeData = inHeaderSize + 40 // behind fuse_write_in
)

// What Files can do besides (FUSE_INIT flags, linux/fuse.h): say where mounts begin,
// and list with attributes. To truncate as they open, which Linux does without a word
// of set-user-ID bits, only together with clearing those.
const (
	filesCapabilities    = fuse.CAP_SUBMOUNTS | fuse.CAP_READDIRPLUS_AUTO
	killPrivCapabilities = fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_ATOMIC_O_TRUNC
)

// fileOps are the requests for Files that are not refused, with the most bytes that
// they may have.
var fileOps = map[uint32]int64{
	opLookup: maxRequest, 3: maxRequest, 4: maxRequest, opReadlink: maxRequest, // GETATTR, SETATTR
	opSymlink: 8 << 10, 8: maxRequest, 9: maxRequest, 10: maxRequest, 11: maxRequest, // MKNOD, MKDIR, UNLINK, RMDIR
	12: maxRequest, 13: maxRequest, 14: maxRequest, opRead: maxRequest, // RENAME, LINK, OPEN
	opWrite: writeData + maxRead, 17: maxRequest, 18: maxRequest, opFsync: maxRequest, // STATFS, RELEASE
	opSetxattr: maxRequest + maxXAttr, opGetxattr: maxRequest, opListxattr: maxRequest, 24: maxRequest, // REMOVEXATTR
	opFlush: maxRequest, 27: maxRequest, opReaddir: maxRequest, 29: maxRequest, opFsyncdir: maxRequest, // OPENDIR, RELEASEDIR
	opAccess: maxRequest, 35: maxRequest, 43: maxRequest, opReaddirplus: maxRequest, // CREATE, FALLOCATE
	45: maxRequest, 46: maxRequest, 47: maxRequest, opSyncfs: maxRequest, // RENAME2, LSEEK, COPY_FILE_RANGE
}

// maxBatch bounds a BATCH_FORGET; Linux packs less into one.
const maxBatch = 64 << 10

// target is the subtree of Files that a request may have to wait for, or nil: that of
// its node, or the one that a LOOKUP leads to.
func (w *worker) target(r *request) *mounted {
	m := r.sub
	if name, ok := r.name(); ok && r.opcode == opLookup {
		if _, child, found := w.tree.child(r.node, name); found {
			m = child
		}
	}
	if m == nil || m.files == nil {
		return nil
	}
	r.sub = m
	return m
}

// reset drops what subtrees know of a session.
func (w *worker) reset() {
	for _, m := range w.tree.mounts() {
		if m.files != nil {
			m.files.Reset()
		}
	}
}

// file answers a request for Files, beside: any of them may take its time.
func (w *worker) file(c *call, r *request) {
	limit := fileOps[r.opcode]
	errno := r.check()
	switch {
	case limit == 0:
		errno = syscall.ENOSYS
	case r.total > limit:
		errno = syscall.EINVAL
	}
	if errno != 0 {
		w.fail(c, r.unique, errno)
		return
	}
	switch r.opcode {
	case opRead, opWrite:
		w.fileData(c, r)
	case opSyncfs:
		w.beside(c, r.unique, r.sub.slots, func() { w.fail(c, r.unique, r.sub.files.SyncFS(r.node&localMask)) })
	default:
		w.beside(c, r.unique, r.sub.slots, func() { w.fileAnswer(c, r) })
	}
}

// beside runs a request in a goroutine of its own as soon as there is one of slots,
// which may be nil, if the queue is not halted before. What runs is waited for.
func (w *worker) beside(c *call, unique uint64, slots chan struct{}, run func()) {
	if !w.acquire(c, unique, w.pending) {
		return
	}
	w.waiting.Go(func() {
		defer func() { <-w.pending }()
		if slots != nil {
			if !w.acquire(c, unique, slots) {
				return
			}
			defer func() { <-slots }()
		}
		run()
	})
}

// acquire takes a slot, or gives the call back.
func (w *worker) acquire(c *call, unique uint64, slots chan struct{}) bool {
	select {
	case slots <- struct{}{}:
		return true
	case <-w.q.Halted():
		w.giveBack(c, unique)
		return false
	}
}

// giveBack ends a call that has not begun and whose queue is halted.
func (w *worker) giveBack(c *call, unique uint64) {
	if w.q.Draining() {
		w.fail(c, unique, syscall.EIO)
		return
	}
	w.q.Keep(&c.chain)
	w.calls.Put(c)
}

// fileAnswer has go-fuse answer a request for Files in memory of the right size.
func (w *worker) fileAnswer(c *call, r *request) {
	s := w.session.Load()
	if s == nil {
		w.fail(c, r.unique, syscall.EIO) // before any INIT
		return
	}
	room := outHeaderSize + r.replySize()
	buf, err := w.fileBuffers.get(w.ctx, room+int(r.total))
	if err != nil {
		w.giveBack(c, r.unique)
		return
	}
	defer w.fileBuffers.put(buf)
	msg := buf[room:]
	if len(msg) > len(r.msg) {
		vhostuser.CopyOut(msg, c.chain.Readable)
	}
	copy(msg, r.msg) // what was looked at; the guest may have changed its own
	n, _ := s.HandleRequest([][]byte{msg}, [][]byte{buf[:room]})
	if n < outHeaderSize || int64(n) > vhostuser.Len(c.chain.Writable) {
		w.fail(c, r.unique, syscall.EIO)
		return
	}
	vhostuser.CopyIn(c.chain.Writable, buf[:n])
	w.push(c, n)
}

// replySize is how many bytes may follow the header of an answer.
func (r *request) replySize() int {
	switch r.opcode {
	case opReaddir, opReaddirplus:
		return int(binary.LittleEndian.Uint32(r.msg[readSize:]))
	case opGetxattr, opListxattr:
		return max(int(binary.LittleEndian.Uint32(r.msg[inHeaderSize:])), 8)
	case opReadlink:
		return syscall.PathMax
	}
	return 256 // fuse_entry_out and fuse_open_out
}

// forget takes FORGET and BATCH_FORGET, which have no reply, to where nodes are
// counted. Other requests without one have no effect.
func (w *worker) forget(c *call, r *request) {
	if !w.mixed || r.opcode == opInterrupt || r.total > maxBatch || len(r.msg) < inHeaderSize+8 {
		w.push(c, 0)
		return
	}
	w.beside(c, r.unique, nil, func() {
		msg := make([]byte, r.total)
		vhostuser.CopyOut(msg, c.chain.Readable)
		copy(msg, r.msg)
		w.forgetAll(r, msg[inHeaderSize:])
		w.push(c, 0)
	})
}

// forgetAll reads fuse_forget_in, or fuse_batch_forget_in and the fuse_forget_one
// that follow.
func (w *worker) forgetAll(r *request, b []byte) {
	le := binary.LittleEndian
	if r.opcode == opForget {
		w.fs.Forget(r.node, le.Uint64(b))
		return
	}
	count := int(le.Uint32(b))
	for b = b[8:]; len(b) >= 16 && count > 0; b = b[16:] {
		w.fs.Forget(le.Uint64(b), le.Uint64(b[8:]))
		count--
	}
}
