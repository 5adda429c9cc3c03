package passthrough

import (
	"context"
	"encoding/binary"
	"net"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// Opcodes and sizes of linux/fuse.h.
const (
	opLookup, opForget, opGetattr, opSetattr, opReadlink, opSymlink, opMknod, opMkdir, opUnlink, opRmdir, opRename, opLink, opOpen, opRead, opWrite, opStatfs, opRelease = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18

	opFsync, opSetxattr, opGetxattr, opListxattr, opFlush, opInit, opOpendir, opReaddir, opReleasedir = 20, 21, 22, 23, 25, 26, 27, 28, 29

	opAccess, opCreate, opDestroy, opBatchForget, opFallocate, opReaddirplus, opRename2, opLseek, opCopy, opSyncfs = 34, 35, 38, 42, 43, 44, 45, 46, 47, 50

	headerSize = 40
	replySize  = 16
	entrySize  = 128

	ringSize = 64
	memSize  = 8 << 20
	inAt     = 1 << 20 // where requests lie in guest memory
	outAt    = 4 << 20 // and replies
	wait     = 20_000  // ms, for what must come
)

// guest is a driver that sends whatever it likes.
type guest struct {
	t      testing.TB
	fe     *vhosttest.Frontend
	ring   *vhosttest.Ring
	srv    *virtiofs.Server
	unique uint64
}

// boot starts a device for a tree, with a session.
func boot(t testing.TB, tree *virtiofs.Tree) *guest {
	t.Helper()
	srv, err := virtiofs.New(virtiofs.Config{Tree: tree, Queues: 1, XAttr: true})
	must(t, err)
	path := filepath.Join(t.TempDir(), "fs.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	done := make(chan error, 1)
	go func() {
		c, err := virtiofs.Accept(context.Background(), l)
		if err == nil {
			err = srv.Serve(context.Background(), c)
		}
		done <- err
	}()
	g := &guest{t: t, srv: srv, fe: vhosttest.Dial(t, path, memSize)}
	t.Cleanup(func() {
		_ = g.fe.Conn.Close() // the end of the session
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	g.fe.Negotiate(0)
	g.fe.AddMemory()
	for i := range 2 {
		g.ring = g.fe.NewRing(i, ringSize, i*vhosttest.RingBytes(ringSize))
		g.ring.Start()
	}
	g.init()
	return g
}

// bootDir is boot for one directory.
func bootDir(t testing.TB, dir string, o Options) *guest {
	t.Helper()
	tree := virtiofs.NewTree()
	must(t, tree.Mount("/", open(t, dir, o)))
	return boot(t, tree)
}

func (g *guest) init() {
	g.t.Helper()
	// fuse_init_in of protocol 7.38; the flags are CAP_SUBMOUNTS, READDIRPLUS and others.
	b := append(vhosttest.U32(7, 38, 1<<20, 0xffff_ffff), make([]byte, 48)...)
	if out, errno := g.call(opInit, 0, b, 256); errno != 0 || len(out) != 64 {
		g.t.Fatalf("INIT: %v, %x", errno, out)
	}
}

// call sends a request with room for an answer of that many bytes, as root.
func (g *guest) call(opcode uint32, node uint64, body []byte, room int) ([]byte, syscall.Errno) {
	g.t.Helper()
	le := binary.LittleEndian
	msg := append(make([]byte, headerSize), body...)
	le.PutUint32(msg, uint32(len(msg)))
	le.PutUint32(msg[4:], opcode)
	le.PutUint64(msg[16:], node)
	return g.send(msg, room+replySize)
}

// must is call for what has to succeed and tells nothing.
func (g *guest) must(opcode uint32, node uint64, body []byte) {
	g.t.Helper()
	if _, errno := g.call(opcode, node, body, 0); errno != 0 {
		g.t.Fatalf("opcode %d: %v", opcode, errno)
	}
}

// send is call for a whole message; room has the answer's header.
func (g *guest) send(msg []byte, room int) ([]byte, syscall.Errno) {
	g.t.Helper()
	le := binary.LittleEndian
	g.unique++
	if len(msg) >= 16 {
		le.PutUint64(msg[8:], g.unique)
	}
	copy(g.fe.Mem[inAt:], msg)
	g.ring.SetDesc(0, vhosttest.Desc{Addr: vhosttest.GuestBase + inAt, Len: uint32(len(msg)), Flags: vhosttest.Next, Next: 1})
	g.ring.SetDesc(1, vhosttest.Desc{Addr: vhosttest.GuestBase + outAt, Len: uint32(room), Flags: vhosttest.Write})
	g.ring.Offer(0)
	_, n, ok := g.ring.WaitUsed(wait)
	if !ok || int(n) > room {
		g.t.Fatalf("opcode %d: answer of %d bytes in room for %d, %v", le.Uint32(msg[4:]), n, room, ok)
	}
	b := append([]byte{}, g.fe.Mem[outAt:outAt+int(n)]...)
	if n == 0 {
		return nil, 0
	}
	if n < replySize || le.Uint32(b) != n || le.Uint64(b[8:]) != g.unique {
		g.t.Fatalf("answer of %d bytes with the header %x", n, b[:min(len(b), replySize)])
	}
	return b[replySize:], syscall.Errno(-int32(le.Uint32(b[4:])))
}

// text makes a body: numbers, then strings with their ends.
func text(head []byte, names ...string) []byte {
	for _, n := range names {
		head = append(append(head, n...), 0)
	}
	return head
}

// lookup finds names one below the other, from the root.
func (g *guest) lookup(names ...string) (node uint64, errno syscall.Errno) {
	g.t.Helper()
	node = 1
	for _, n := range names {
		b, errno := g.call(opLookup, node, text(nil, n), entrySize)
		if errno != 0 {
			return 0, errno
		}
		node = binary.LittleEndian.Uint64(b)
	}
	return node, 0
}

func (g *guest) find(names ...string) uint64 {
	g.t.Helper()
	n, errno := g.lookup(names...)
	if errno != 0 {
		g.t.Fatalf("%q: %v", names, errno)
	}
	return n
}

func (g *guest) open(node uint64, flags uint32) (uint64, syscall.Errno) {
	g.t.Helper()
	b, errno := g.call(opOpen, node, vhosttest.U32(flags, 0), 16)
	if errno != 0 {
		return 0, errno
	}
	return binary.LittleEndian.Uint64(b), 0
}

func (g *guest) create(dir uint64, name string) (node, handle uint64, errno syscall.Errno) {
	g.t.Helper()
	b, errno := g.call(opCreate, dir, text(vhosttest.U32(syscall.O_RDWR, 0o644, 0, 0), name), entrySize+16)
	if errno != 0 {
		return 0, 0, errno
	}
	return binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[entrySize:]), 0
}

func (g *guest) read(node, handle, off, n uint64) ([]byte, syscall.Errno) {
	g.t.Helper()
	return g.call(opRead, node, vhosttest.U64(handle, off, n, 0, 0), int(n))
}

func (g *guest) write(node, handle, off uint64, data string) syscall.Errno {
	g.t.Helper()
	_, errno := g.call(opWrite, node, append(vhosttest.U64(handle, off, uint64(len(data)), 0, 0), data...), 8)
	return errno
}
