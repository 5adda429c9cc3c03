// Package guesttest is a guest of a virtio-fs device, as far as tests of what a
// device serves need one: it has memory and rings, looks names up and reads files.
package guesttest

import (
	"encoding/binary"
	"syscall"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// Requests and headers of include/uapi/linux/fuse.h.
const (
	opLookup = 1
	opRead   = 15
	opInit   = 26

	inHeader  = 40
	outHeader = 16
)

// MaxRead is the most that one Read reads, in bytes.
const MaxRead = 1 << 20

// What a queue has of the guest's memory, in bytes.
const (
	ringSize  = 64
	inAt      = 64 << 10 // behind the ring
	outAt     = 128 << 10
	queueSize = 2 << 20
)

// patience bounds every wait.
const patience = 3 * time.Minute

// Guest is a driver with one or more request queues.
type Guest struct {
	Frontend *vhosttest.Frontend
	Queues   []*Queue // of requests
}

// Queue is a request queue, for one goroutine.
type Queue struct {
	t      testing.TB
	fe     *vhosttest.Frontend
	ring   *vhosttest.Ring
	at     int // in the guest's memory
	unique uint64
}

// Start connects to the device at path and begins a session. The connection ends
// with the test.
func Start(t testing.TB, path string, queues int) *Guest {
	t.Helper()
	g := &Guest{Frontend: vhosttest.Dial(t, path, (1+queues)*queueSize)}
	t.Cleanup(func() { _ = g.Frontend.Conn.Close() }) // tests may have done so
	g.Frontend.Negotiate(0)
	g.Frontend.AddMemory()
	for i := range 1 + queues { // the first is the high-priority queue
		q := &Queue{t: t, fe: g.Frontend, at: i * queueSize}
		q.ring = g.Frontend.NewRing(i, ringSize, q.at)
		q.ring.Start()
		if i > 0 {
			g.Queues = append(g.Queues, q)
		}
	}
	g.Queues[0].init()
	return g
}

func (q *Queue) init() {
	q.t.Helper()
	// fuse_init_in of protocol 7.38: versions, readahead, flags.
	body := append(vhosttest.U64(7|38<<32), make([]byte, 56)...)
	if _, errno := q.call(opInit, 0, body, 256); errno != 0 {
		q.t.Fatalf("INIT: %v", errno)
	}
}

// Lookup finds a file of a directory; the root directory is node 1.
func (q *Queue) Lookup(parent uint64, name string) (node uint64, size int64, errno syscall.Errno) {
	q.t.Helper()
	b, errno := q.call(opLookup, parent, append([]byte(name), 0), 144)
	if errno != 0 {
		return 0, 0, errno
	}
	// fuse_entry_out: node id first, the size in fuse_attr behind 40 bytes.
	return binary.LittleEndian.Uint64(b), int64(binary.LittleEndian.Uint64(b[48:])), 0
}

// Read reads up to n bytes, at most MaxRead.
func (q *Queue) Read(node uint64, off, n int64) ([]byte, syscall.Errno) {
	q.t.Helper()
	return q.call(opRead, node, vhosttest.U64(0, uint64(off), uint64(n), 0, 0), int(n))
}

// ReadAll reads a file of this size.
func (q *Queue) ReadAll(node uint64, size int64) ([]byte, syscall.Errno) {
	q.t.Helper()
	var all []byte
	for int64(len(all)) < size {
		b, errno := q.Read(node, int64(len(all)), MaxRead)
		if errno != 0 {
			return all, errno
		}
		if len(b) == 0 {
			q.t.Fatalf("file of %d bytes ends after %d", size, len(all))
		}
		all = append(all, b...)
	}
	return all, 0
}

// call makes a request and returns a copy of the reply's body, of at most room bytes.
func (q *Queue) call(opcode uint32, node uint64, body []byte, room int) ([]byte, syscall.Errno) {
	q.t.Helper()
	le := binary.LittleEndian
	q.unique++
	in := q.fe.Mem[q.at+inAt:][:inHeader+len(body)]
	clear(in)
	le.PutUint32(in, uint32(len(in)))
	le.PutUint32(in[4:], opcode)
	le.PutUint64(in[8:], q.unique)
	le.PutUint64(in[16:], node)
	copy(in[inHeader:], body)
	q.ring.SetDesc(0, vhosttest.Desc{Addr: q.guest(inAt), Len: uint32(len(in)), Flags: vhosttest.Next, Next: 1})
	q.ring.SetDesc(1, vhosttest.Desc{Addr: q.guest(outAt), Len: uint32(outHeader + room), Flags: vhosttest.Write})
	q.ring.Offer(0)
	_, n, ok := q.ring.WaitUsed(int(patience / time.Millisecond))
	out := q.fe.Mem[q.at+outAt:]
	if !ok || n < outHeader || le.Uint32(out) != n || le.Uint64(out[8:]) != q.unique {
		q.t.Errorf("request %d: answer of %d bytes, %v, with the header %x", opcode, n, ok, out[:outHeader])
		return nil, syscall.EPROTO
	}
	return append([]byte(nil), out[outHeader:n]...), syscall.Errno(-int32(le.Uint32(out[4:])))
}

func (q *Queue) guest(at int) uint64 { return vhosttest.GuestBase + uint64(q.at+at) }
