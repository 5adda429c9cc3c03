package virtiofs

import (
	"encoding/binary"
	"math"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
)

// flow is one READ or WRITE of Files: n bytes between buffers of the guest and an
// open file, by as many system calls as it takes.
type flow struct {
	*call
	r    *request
	off  int64
	n    int64
	done int64
	room [][]byte // for what is left
}

// fileData answers a READ at once if its bytes are in the page cache, everything else
// beside.
func (w *worker) fileData(c *call, r *request) {
	f, errno := w.flow(c, r)
	if errno != 0 {
		w.fail(c, r.unique, errno)
		return
	}
	if r.opcode == opRead && f.read(false) == 0 && f.done == f.n {
		w.direct.Add(1)
		w.endRead(f, 0)
		return
	}
	w.beside(c, r.unique, r.sub.slots, func() {
		if r.opcode == opRead {
			w.endRead(f, f.read(true))
		} else {
			w.endWrite(f, f.write())
		}
	})
}

// flow checks a request.
func (w *worker) flow(c *call, r *request) (*flow, syscall.Errno) {
	if w.session.Load() == nil {
		return nil, syscall.EIO // before any INIT
	}
	off, n, errno := r.readRange() // fuse_write_in begins as fuse_read_in does
	if errno != 0 || off > math.MaxInt64-n {
		return nil, syscall.EINVAL
	}
	bufs, head := c.chain.Writable, int64(outHeaderSize)
	if r.opcode == opWrite {
		bufs, head = c.chain.Readable, writeData
	}
	if vhostuser.Len(bufs) < head+n {
		return nil, syscall.EINVAL
	}
	c.bufs = append(c.bufs[:0], bufs...)
	return &flow{call: c, r: r, off: off, n: n, room: skip(c.bufs, int(head))}, 0
}

// read goes on until all is read, the file ends, or there is an error.
func (f *flow) read(wait bool) syscall.Errno {
	le := binary.LittleEndian
	in := fuse.ReadIn{Fh: le.Uint64(f.r.msg[inHeaderSize:])}
	in.NodeId = f.r.node & localMask
	for f.done < f.n {
		in.Offset = uint64(f.off + f.done)
		got, errno := f.r.sub.files.ReadV(&in, f.next(), wait)
		if errno != 0 || got == 0 {
			return errno
		}
		f.advance(got)
	}
	return 0
}

func (f *flow) write() syscall.Errno {
	le := binary.LittleEndian
	in := fuse.WriteIn{Fh: le.Uint64(f.r.msg[inHeaderSize:]), WriteFlags: le.Uint32(f.r.msg[inHeaderSize+20:]),
		Flags: le.Uint32(f.r.msg[inHeaderSize+32:])}
	in.NodeId = f.r.node & localMask
	for first := true; first || f.done < f.n; first = false {
		in.Offset = uint64(f.off + f.done)
		got, errno := f.r.sub.files.WriteV(&in, f.next())
		if errno != 0 || got == 0 {
			return errno
		}
		f.advance(got)
	}
	return 0
}

// next is what one system call may fill.
func (f *flow) next() [][]byte {
	f.iov = first(f.iov[:0], f.room, f.n-f.done)
	return f.iov
}

func (f *flow) advance(n int) {
	f.done += int64(n)
	f.room = skip(f.room, n)
}

// endRead answers with what was read. An error behind it comes again when the guest
// reads on.
func (w *worker) endRead(f *flow, errno syscall.Errno) {
	if errno != 0 && f.done == 0 {
		w.failures.Add(1)
		w.fail(f.call, f.r.unique, errno)
		return
	}
	w.reads.Add(1)
	w.readBytes.Add(f.done)
	var b [outHeaderSize]byte
	putHeader(&b, f.r.unique, 0, int(f.done))
	vhostuser.CopyIn(f.chain.Writable, b[:])
	w.push(f.call, outHeaderSize+int(f.done))
}

// endWrite answers with the number of bytes that were written, as fuse_write_out.
func (w *worker) endWrite(f *flow, errno syscall.Errno) {
	if errno != 0 && f.done == 0 {
		w.fail(f.call, f.r.unique, errno)
		return
	}
	w.writes.Add(1)
	w.writeBytes.Add(f.done)
	var b [outHeaderSize + 8]byte
	putHeader((*[outHeaderSize]byte)(b[:]), f.r.unique, 0, 8)
	binary.LittleEndian.PutUint32(b[outHeaderSize:], uint32(f.done))
	n, _ := vhostuser.CopyIn(f.chain.Writable, b[:])
	w.push(f.call, n)
}
