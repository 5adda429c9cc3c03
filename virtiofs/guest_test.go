package virtiofs

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

const (
	ringSize = 64
	memSize  = 8 << 20
	inAt     = 1 << 20 // where requests lie in guest memory
	outAt    = 2 << 20 // and replies
	wait     = 10_000  // ms, for what must come
)

// content is the byte at off of every test file.
func content(off int64) byte { return byte(off) + byte(off>>12) }

func contents(off, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = content(off + int64(i))
	}
	return b
}

// funcFile is a File that lies nowhere.
type funcFile struct {
	size int64
	read func(ctx context.Context, p []byte, off int64) (int, error)
}

func (f *funcFile) Size() int64 { return f.size }
func (f *funcFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return f.read(ctx, p, off)
}

func good(size int64) *funcFile {
	return &funcFile{size, func(_ context.Context, p []byte, off int64) (int, error) {
		return copy(p, contents(off, int64(len(p)))), nil
	}}
}

// mappedFile has the first part of its bytes in an open file, shifted by a page.
type mappedFile struct {
	*funcFile
	f    *os.File
	have int64
}

func (m *mappedFile) Map(off int64) (*os.File, int64, int64, uint64) {
	return m.f, off + 4096, m.have - off, 0
}

func (m *mappedFile) Valid(int64, uint64) bool { return true }

func mapped(t *testing.T, size, have int64, rest *funcFile) *mappedFile {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(append(make([]byte, 4096), contents(0, size)...)); err != nil {
		t.Fatal(err)
	}
	if rest == nil {
		rest = &funcFile{size, func(context.Context, []byte, int64) (int, error) { return 0, errors.New("asked for mapped bytes") }}
	}
	return &mappedFile{rest, f, have}
}

// guest is a driver of the device.
type guest struct {
	t      *testing.T
	fe     *vhosttest.Frontend
	rings  []*vhosttest.Ring // high-priority, requests
	srv    *Server
	done   chan error
	unique uint64
}

// start runs a device with two request queues until the test ends.
func start(t *testing.T, cfg Config) *guest {
	t.Helper()
	if cfg.Queues == 0 {
		cfg.Queues = 2
	}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "fs.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, srv: srv, done: make(chan error, 1)}
	go func() {
		c, err := Accept(context.Background(), l)
		if err == nil {
			err = srv.Serve(context.Background(), c)
		}
		g.done <- err
	}()
	g.fe = vhosttest.Dial(t, path, memSize)
	t.Cleanup(func() {
		_ = g.fe.Conn.Close() // tests may have done so
		if err := <-g.done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	g.fe.Negotiate(0)
	g.fe.AddMemory()
	for i := range 1 + cfg.Queues {
		g.rings = append(g.rings, g.fe.NewRing(i, ringSize, i*vhosttest.RingBytes(ringSize)))
		g.rings[i].Start()
	}
	return g
}

// initialized is start with an INIT.
func initialized(t *testing.T, cfg Config) *guest {
	t.Helper()
	g := start(t, cfg)
	g.init()
	return g
}

func (g *guest) init() {
	g.t.Helper()
	// fuse_init_in of protocol 7.38: versions, readahead, flags.
	b := binary.LittleEndian.AppendUint64(nil, 7|38<<32)
	out, errno := g.call(1, message(opInit, 0, append(b, make([]byte, 56)...)), 256)
	if errno != 0 || len(out) != 64 || binary.LittleEndian.Uint32(out) != 7 {
		g.t.Fatalf("INIT: %v, %x", errno, out)
	}
}

// message builds a request; call sets its unique.
func message(opcode uint32, node uint64, body []byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, inHeaderSize, inHeaderSize+len(body))
	le.PutUint32(b, uint32(inHeaderSize+len(body)))
	le.PutUint32(b[4:], opcode)
	le.PutUint64(b[16:], node)
	return append(b, body...)
}

func words(vs ...uint64) []byte { return vhosttest.U64(vs...) }

func readMessage(node, off, n uint64) []byte {
	return message(opRead, node, words(0, off, n, 0, 0))
}

// offer makes a request available in two pieces, with room for the reply in pieces
// of a page that do not follow each other.
func (g *guest) offer(ring int, msg []byte, room int) {
	g.unique++
	if len(msg) >= inHeaderSize {
		binary.LittleEndian.PutUint64(msg[8:], g.unique)
	}
	copy(g.fe.Mem[inAt:], msg)
	var ds []vhosttest.Desc
	add := func(at, n int, flags uint16) {
		ds = append(ds, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(at), Len: uint32(n), Flags: flags})
	}
	half := len(msg) / 2
	add(inAt, half, 0)
	add(inAt+half, len(msg)-half, 0)
	for at := 0; at < room; at += 4096 {
		add(outAt+2*at, min(4096, room-at), vhosttest.Write)
	}
	table := g.fe.Mem[inAt+64<<10:]
	for i, d := range ds {
		if i+1 < len(ds) {
			d.Flags |= vhosttest.Next
			d.Next = uint16(i + 1)
		}
		vhosttest.PutDesc(table[16*i:], d)
	}
	r := g.rings[ring]
	r.SetDesc(0, vhosttest.Desc{Addr: vhosttest.GuestBase + inAt + 64<<10, Len: uint32(16 * len(ds)), Flags: vhosttest.Indirect})
	r.Offer(0)
}

// reply waits for the answer to the last offer.
func (g *guest) reply(ring int) ([]byte, syscall.Errno) {
	g.t.Helper()
	_, n, ok := g.rings[ring].WaitUsed(wait)
	if !ok {
		g.t.Fatal("no answer")
	}
	var b []byte
	for at := 0; at < int(n); at += 4096 {
		b = append(b, g.fe.Mem[outAt+2*at:][:min(4096, int(n)-at)]...)
	}
	le := binary.LittleEndian
	if len(b) < outHeaderSize || int(le.Uint32(b)) != len(b) || le.Uint64(b[8:]) != g.unique {
		g.t.Fatalf("reply of %d bytes with the header %x", n, b[:min(len(b), outHeaderSize)])
	}
	return b[outHeaderSize:], syscall.Errno(-int32(le.Uint32(b[4:])))
}

func (g *guest) call(ring int, msg []byte, room int) ([]byte, syscall.Errno) {
	g.t.Helper()
	g.offer(ring, msg, room)
	return g.reply(ring)
}

func (g *guest) lookup(name string) (node uint64, size uint64, errno syscall.Errno) {
	g.t.Helper()
	b, errno := g.call(1, message(opLookup, 1, append([]byte(name), 0)), 144)
	if errno != 0 {
		return 0, 0, errno
	}
	// fuse_entry_out: node id first, the size in fuse_attr behind 40 bytes.
	return binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[48:]), 0
}

func (g *guest) read(node, off, n uint64) ([]byte, syscall.Errno) {
	g.t.Helper()
	return g.call(2, readMessage(node, off, n), outHeaderSize+int(n))
}

func directory(t *testing.T, files map[string]File) *Directory {
	t.Helper()
	d := NewDirectory()
	for name, f := range files {
		if err := d.Add(name, f); err != nil {
			t.Fatal(err)
		}
	}
	return d
}
