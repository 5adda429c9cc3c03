package virtiofs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
	"golang.org/x/sys/unix"
)

func TestReads(t *testing.T) {
	const size = 300_000
	for name, f := range map[string]File{
		"memory":        good(size),
		"open file":     mapped(t, size, size, nil),
		"both":          mapped(t, size, 70_001, good(size)),
		"nothing there": mapped(t, size, 0, good(size)),
	} {
		t.Run(name, func(t *testing.T) {
			g := initialized(t, Config{Directory: directory(t, map[string]File{"image": f})})
			node, n, errno := g.lookup("image")
			if n != size || errno != 0 {
				t.Fatalf("size %d, %v", n, errno)
			}
			for _, r := range [][2]int64{{0, 1}, {0, 4096}, {5, 8192}, {65_000, 131_072}, {size - 3, 4096}, {size, 10}, {size + 5, 10}, {7, 0}} {
				want := contents(r[0], max(0, min(r[1], size-r[0])))
				if got, errno := g.read(node, uint64(r[0]), uint64(r[1])); errno != 0 || !bytes.Equal(got, want) {
					t.Errorf("read %v: %v, %d bytes of %d, or others", r, errno, len(got), len(want))
				}
			}
		})
	}
}

// growingFile is mapped as far as it was asked for, and a little more.
type growingFile struct {
	*mappedFile
	asked atomic.Int64 // calls of ReadAt
}

func growing(t *testing.T, size int64) *growingFile {
	g := &growingFile{mappedFile: mapped(t, size, 0, nil)}
	g.read = func(_ context.Context, p []byte, off int64) (int, error) {
		g.asked.Add(1)
		g.have = min(size, off+2*int64(len(p)))
		return copy(p, contents(off, int64(len(p)))), nil
	}
	return g
}

// What is mapped by the time that a piece was read is not asked for.
func TestPieces(t *testing.T) {
	const size = 1 << 20
	f := growing(t, size)
	g := initialized(t, Config{Directory: directory(t, map[string]File{"image": f})})
	node, _, _ := g.lookup("image")
	if got, errno := g.read(node, 0, size); errno != 0 || !bytes.Equal(got, contents(0, size)) {
		t.Errorf("%v, %d bytes or others", errno, len(got))
	}
	if n := f.asked.Load(); n != size/(2*piece) {
		t.Errorf("asked for %d pieces", n)
	}
}

// fadingFile says where its bytes are and, when they were read, that they were not
// there any more.
type fadingFile struct {
	*mappedFile
	close bool
}

func (f *fadingFile) Map(off int64) (*os.File, int64, int64, uint64) {
	if f.close {
		_ = f.f.Close() // it is only read
	}
	return f.f, 0, f.size - off, 5
}

func (f *fadingFile) Valid(_ int64, stamp uint64) bool { return stamp != 5 }

// Bytes that were not there all the time of a read do not count, nor does its error.
func TestFading(t *testing.T) {
	const size = 300_000
	for _, closed := range []bool{false, true} {
		f := &fadingFile{mapped(t, size, size, good(size)), closed}
		g := initialized(t, Config{Directory: directory(t, map[string]File{"image": f})})
		node, _, _ := g.lookup("image")
		if got, errno := g.read(node, 1000, size); errno != 0 || !bytes.Equal(got, contents(1000, size-1000)) {
			t.Errorf("closed %v: %v, %d bytes or others", closed, errno, len(got))
		}
		if st := g.srv.Stats(); st.Direct != 0 {
			t.Errorf("closed %v: %+v", closed, st)
		}
	}
}

// What is in the page cache takes no goroutine.
func TestDirectReads(t *testing.T) {
	g := initialized(t, Config{Directory: directory(t, map[string]File{"image": mapped(t, 1<<20, 1<<20, nil)})})
	node, _, _ := g.lookup("image")
	for off := range uint64(10) {
		if _, errno := g.read(node, off<<12, 4096); errno != 0 {
			t.Fatal(errno)
		}
	}
	if s := g.srv.Stats(); s.Direct != 10 || s.Reads != 10 || s.ReadBytes != 40960 || s.Sessions != 1 {
		t.Errorf("stats: %+v", s)
	}
}

func TestNames(t *testing.T) {
	d := directory(t, map[string]File{"one": good(1), "two": good(2)})
	d.Find = func(name string) {
		if name == "late" {
			if err := d.Add(name, good(3)); err != nil {
				t.Error(err)
			}
		}
	}
	g := initialized(t, Config{Directory: d})
	one, _, _ := g.lookup("one")
	for name, want := range map[string]uint64{"one": 1, "two": 2, "late": 3} {
		if _, size, errno := g.lookup(name); size != want || errno != 0 {
			t.Errorf("lookup %s: size %d, %v", name, size, errno)
		}
	}
	if again, _, _ := g.lookup("one"); again != one {
		t.Errorf("node id was %d and is %d", one, again)
	}
	for _, name := range []string{"", ".", "..", "none", "a/b", ".go-fuse-epoll-hack", string(bytes.Repeat([]byte("x"), 256))} {
		if _, _, errno := g.lookup(name); errno != syscall.ENOENT {
			t.Errorf("lookup %q: %v", name, errno)
		}
	}
	if b, errno := g.call(1, message(opLookup, one, []byte("one\x00")), 144); errno != syscall.ENOENT {
		t.Errorf("lookup in a file: %x, %v", b, errno)
	}
	d.Remove("one")
	if _, _, errno := g.lookup("one"); errno != syscall.ENOENT {
		t.Errorf("lookup of a removed file: %v", errno)
	}
	if _, errno := g.read(one, 0, 1); errno != syscall.ESTALE {
		t.Errorf("read of a removed file: %v", errno)
	}
	if got := g.list(1); !slices.Equal(got, []string{"late", "two"}) {
		t.Errorf("listing: %q", got)
	}
}

// list reads the directory in small pieces.
func (g *guest) list(dir uint64) (names []string) {
	g.t.Helper()
	for off := uint64(0); ; {
		b, errno := g.call(1, message(opReaddir, dir, words(0, off, 40, 0, 0)), outHeaderSize+40)
		if errno != 0 {
			g.t.Fatal(errno)
		}
		if len(b) == 0 {
			slices.Sort(names)
			return names
		}
		for len(b) > 0 { // fuse_dirent: ino, off, length of the name, type, name
			n := int(binary.LittleEndian.Uint32(b[16:]))
			names = append(names, string(b[24:24+n]))
			off = binary.LittleEndian.Uint64(b[8:])
			b = b[min(len(b), (24+n+7)&^7):]
		}
	}
}

// Whether the guest keeps pages of a file is the configuration's choice.
func TestOpen(t *testing.T) {
	const directIO, keepCache, noFlush = 1, 2, 32 // fuse.h, FOPEN_
	for cached, want := range map[bool]uint32{false: directIO | keepCache | noFlush, true: keepCache | noFlush} {
		d := directory(t, map[string]File{"image": good(1)})
		d.Cached = cached
		g := initialized(t, Config{Directory: d})
		node, _, _ := g.lookup("image")
		b, errno := g.call(1, message(14, node, words(0)), outHeaderSize+16)
		if errno != 0 || binary.LittleEndian.Uint32(b[8:]) != want {
			t.Errorf("cached %v: %v, %x", cached, errno, b)
		}
		if b, errno := g.call(1, message(27, node, words(0)), outHeaderSize+16); errno != syscall.ENOTDIR {
			t.Errorf("a file as directory: %v, %x", errno, b)
		}
	}
}

func TestAdd(t *testing.T) {
	d := directory(t, map[string]File{"a": good(1)})
	for _, name := range []string{"", ".", ".hidden", "a/b", "a\x00", string(make([]byte, 256))} {
		if err := d.Add(name, good(1)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := d.Add("a", good(1)); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	d.Remove("none")
}

// A guest can send anything.
func TestHostileRequests(t *testing.T) {
	g := initialized(t, Config{Directory: directory(t, map[string]File{"image": good(100)})})
	node, _, _ := g.lookup("image")
	for _, tc := range []struct {
		name string
		msg  []byte
		room int
		want syscall.Errno
	}{
		{"write", message(16, node, make([]byte, 80)), 64, syscall.EROFS},
		{"create", message(35, 1, append(make([]byte, 16), "x\x00"...)), 200, syscall.EROFS},
		{"open to write", message(14, node, words(syscall.O_RDWR)), 32, syscall.EROFS},
		{"open of nothing", message(14, 999, words(0)), 32, syscall.ESTALE},
		{"go-fuse's own node", message(14, ^uint64(0), words(0)), 32, syscall.ESTALE},
		{"attributes of nothing", message(3, 999, words(0, 0)), 120, syscall.ESTALE},
		{"unknown", message(4096, 1, nil), 16, syscall.ENOSYS},
		{"attribute with much room", message(22, node, words(0xffff_ffff)), 64, syscall.ENOSYS},
		{"huge read", readMessage(node, 0, maxRead+1), 64, syscall.EINVAL},
		{"read far away", readMessage(node, 1<<63, 1), 17, syscall.EINVAL},
		{"read without room", readMessage(node, 0, 64), 40, syscall.EINVAL},
		{"read of the directory", readMessage(1, 0, 8), 24, syscall.ESTALE},
		{"short read request", message(opRead, node, words(0, 0)), 64, syscall.EINVAL},
		{"long lookup", message(opLookup, 1, make([]byte, 5000)), 200, syscall.ENOSYS},
		{"lookup without an end", message(opLookup, 1, []byte("image")), 200, syscall.ENOENT},
		{"short listing request", message(opReaddir, 1, words(0)), 64, syscall.EINVAL},
		{"short request", message(14, node, nil), 64, syscall.EIO},
		{"extension beyond the end", extended(message(3, node, words(0, 0))), 200, syscall.EIO},
	} {
		if b, errno := g.call(1, tc.msg, tc.room); errno != tc.want || len(b) != 0 {
			t.Errorf("%s: %v with %d bytes, want %v", tc.name, errno, len(b), tc.want)
		}
	}
	for name, msg := range map[string][]byte{"forget": message(opForget, node, words(1)), "interrupt": message(opInterrupt, 0, words(1)), "stub": message(1, 1, nil)[:20]} {
		g.offer(0, msg, 64)
		if _, n, ok := g.rings[0].WaitUsed(wait); !ok || n != 0 {
			t.Errorf("%s: %d bytes, %v", name, n, ok)
		}
	}
	g.offer(1, message(opLookup, 1, []byte("image\x00")), 7) // room for half a header
	if _, n, ok := g.rings[1].WaitUsed(wait); !ok || n != 7 {
		t.Errorf("little room: %d bytes, %v", n, ok)
	}
	if got, errno := g.read(node, 0, 100); errno != 0 || !bytes.Equal(got, contents(0, 100)) {
		t.Error("the device does not work any more", errno)
	}
}

// extended claims 8 × 65535 bytes of extensions.
func extended(b []byte) []byte {
	binary.LittleEndian.PutUint16(b[36:], 0xffff)
	return b
}

func TestBeforeInit(t *testing.T) {
	g := start(t, Config{Directory: NewDirectory()})
	if _, _, errno := g.lookup("x"); errno != syscall.EIO {
		t.Error(errno)
	}
	g.init()
	g.init() // remount
	for _, r := range g.rings {
		r.Stop()
	}
	for _, r := range g.rings {
		r.Restart()
	}
	if _, _, errno := g.lookup("x"); errno != syscall.ENOENT { // a machine that was paused sends no INIT
		t.Error(errno)
	}
	if n := g.srv.Stats().Sessions; n != 2 {
		t.Errorf("%d sessions", n)
	}
}

func TestReadErrors(t *testing.T) {
	fail := &funcFile{100, func(context.Context, []byte, int64) (int, error) { return 0, errors.New("down") }}
	short := &funcFile{100, func(_ context.Context, p []byte, _ int64) (int, error) { return len(p) - 1, nil }}
	cut := mapped(t, 100, 8192, nil)
	cut.funcFile = good(8192) // says more than the file has
	g := initialized(t, Config{Directory: directory(t, map[string]File{"fail": fail, "short": short, "cut": cut})})
	for _, name := range []string{"fail", "short", "cut"} {
		node, _, _ := g.lookup(name)
		if _, errno := g.read(node, 0, 8192); errno != syscall.EIO {
			t.Errorf("%s: %v", name, errno)
		}
	}
	if n := g.srv.Stats().Failures; n != 3 {
		t.Errorf("%d failures", n)
	}
}

// stuck is a file whose reads wait until they are told to go on, or cut short.
type stuck struct {
	*funcFile
	entered chan struct{}
	goOn    chan struct{}
	cut     atomic.Int64
}

func newStuck() *stuck {
	s := &stuck{entered: make(chan struct{}, 100), goOn: make(chan struct{})}
	s.funcFile = &funcFile{1 << 20, func(ctx context.Context, p []byte, off int64) (int, error) {
		s.entered <- struct{}{}
		select {
		case <-s.goOn:
			return copy(p, contents(off, int64(len(p)))), nil
		case <-ctx.Done():
			s.cut.Add(1)
			return 0, ctx.Err()
		}
	}}
	return s
}

// A read that waits for the network holds up neither other requests nor a change
// of the guest's memory, after which it is taken up again.
func TestMemoryChangesUnderARead(t *testing.T) {
	s := newStuck()
	g := initialized(t, Config{Directory: directory(t, map[string]File{"stuck": s, "image": good(10)})})
	node, _, _ := g.lookup("stuck")
	g.offer(2, readMessage(node, 4096, 8192), outHeaderSize+8192)
	<-s.entered
	unique := g.unique
	// Its buffers are those of the next request, too: they are looked at again.
	msg := bytes.Clone(g.fe.Mem[inAt : inAt+readEnd])
	table := bytes.Clone(g.fe.Mem[inAt+64<<10:][:4096])
	if _, _, errno := g.lookup("image"); errno != 0 {
		t.Errorf("lookup beside: %v", errno)
	}
	copy(g.fe.Mem[inAt:], msg)
	copy(g.fe.Mem[inAt+64<<10:], table)
	g.fe.SetMemory(1)
	<-s.entered
	g.fe.SetMemory(2)
	<-s.entered
	if s.cut.Load() != 2 {
		t.Errorf("cut short %d times", s.cut.Load())
	}
	close(s.goOn)
	g.unique = unique
	if got, errno := g.reply(2); errno != 0 || !bytes.Equal(got, contents(4096, 8192)) {
		t.Errorf("read over two changes: %v, %d bytes", errno, len(got))
	}
}

func TestRemoveUnderARead(t *testing.T) {
	s := newStuck()
	d := directory(t, map[string]File{"stuck": s})
	g := initialized(t, Config{Directory: d})
	node, _, _ := g.lookup("stuck")
	g.offer(2, readMessage(node, 0, 4096), outHeaderSize+4096)
	<-s.entered
	d.Remove("stuck")
	if _, errno := g.reply(2); errno != syscall.EIO {
		t.Error(errno)
	}
}

// A driver that stops gets its answers.
// A read that has no turn, because those of another file do not end, does not hold up
// the end of its own.
func TestRemoveBehindReads(t *testing.T) {
	s, m := newStuck(), &missing{newStuck(), make(chan struct{}, 1)}
	dir := directory(t, map[string]File{"stuck": s, "behind": m})
	g := initialized(t, Config{Directory: dir, Requests: 1, Queues: 2})
	node, _, _ := g.lookup("stuck")
	behind, _, _ := g.lookup("behind")
	g.offer(2, readMessage(node, 0, 4096), outHeaderSize+4096)
	<-s.entered
	g.offer(1, readMessage(behind, 0, 4096), outHeaderSize+4096)
	<-m.asked
	dir.Remove("behind") // or hangs
	if _, errno := g.reply(1); errno != syscall.EIO {
		t.Errorf("read of what was removed: %v", errno)
	}
	close(s.goOn)
	if _, used, ok := g.rings[2].WaitUsed(wait); !ok || used != outHeaderSize+4096 {
		t.Error(used, ok)
	}
}

// missing says that none of its bytes are in an open file.
type missing struct {
	*stuck
	asked chan struct{}
}

func (m *missing) Map(int64) (*os.File, int64, int64, uint64) {
	m.asked <- struct{}{}
	return nil, 0, 0, 0
}

func (m *missing) Valid(int64, uint64) bool { return false }

func TestStopUnderARead(t *testing.T) {
	s := newStuck()
	g := initialized(t, Config{Directory: directory(t, map[string]File{"stuck": s})})
	node, _, _ := g.lookup("stuck")
	g.offer(2, readMessage(node, 0, 4096), outHeaderSize+4096)
	<-s.entered
	stopped := make(chan uint32)
	go func() { stopped <- g.rings[2].Stop() }()
	close(s.goOn)
	if got, errno := g.reply(2); errno != 0 || !bytes.Equal(got, contents(0, 4096)) {
		t.Errorf("%v, %d bytes", errno, len(got))
	}
	if base := <-stopped; base != 1 {
		t.Errorf("stopped at %d", base)
	}
}

// It does not get them for ever: a registry that hangs must not hang the VMM.
func TestStopUnderAStuckRead(t *testing.T) {
	s := newStuck()
	g := initialized(t, Config{Directory: directory(t, map[string]File{"stuck": s})})
	node, _, _ := g.lookup("stuck")
	g.offer(2, readMessage(node, 0, 4096), outHeaderSize+4096)
	<-s.entered
	if base := g.rings[2].Stop(); base != 1 {
		t.Errorf("stopped at %d", base)
	}
	if _, errno := g.reply(2); errno != syscall.EIO {
		t.Error(errno)
	}
}

// The owner hears at once of a VMM that has gone, whatever the reads wait for.
func TestLostFrontEnd(t *testing.T) {
	s := newStuck()
	g := initialized(t, Config{Directory: directory(t, map[string]File{"stuck": s})})
	node, _, _ := g.lookup("stuck")
	g.offer(2, readMessage(node, 0, 4096), outHeaderSize+4096)
	<-s.entered
	if err := g.fe.Conn.Close(); err != nil {
		t.Fatal(err)
	}
	err := <-g.done // for ever, if the read is not cut short
	if err != nil || s.cut.Load() != 1 {
		t.Errorf("%v, cut short %d times", err, s.cut.Load())
	}
	g.done <- err
}

// Reads that wait are bounded in number and in memory; those behind them wait in
// the ring.
func TestBounds(t *testing.T) {
	s := newStuck()
	g := initialized(t, Config{Directory: directory(t, map[string]File{"stuck": s}), Requests: 3, ReplyBytes: maxRead, Queues: 1})
	node, _, _ := g.lookup("stuck")
	g.unique++
	msg := readMessage(node, 0, 4096)
	binary.LittleEndian.PutUint64(msg[8:], g.unique)
	copy(g.fe.Mem[inAt:], msg)
	r := g.rings[1]
	const n = ringSize / 2
	for i := range n {
		r.SetDesc(2*i, vhosttest.Desc{Addr: vhosttest.GuestBase + inAt, Len: uint32(len(msg)), Flags: vhosttest.Next, Next: uint16(2*i + 1)})
		r.SetDesc(2*i+1, vhosttest.Desc{Addr: vhosttest.GuestBase + outAt + 8192*uint64(i), Len: outHeaderSize + 4096, Flags: vhosttest.Write})
		r.Queue(uint16(2 * i))
	}
	r.Kick()
	for range 3 {
		<-s.entered
	}
	if got := len(g.srv.dev.slots); got != 3 {
		t.Errorf("%d reads wait", got)
	}
	close(s.goOn)
	for range n {
		if _, used, ok := r.WaitUsed(wait); !ok || used != outHeaderSize+4096 {
			t.Fatal(used, ok)
		}
	}
}

func TestConfig(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no directory": {}, "queues": {Directory: NewDirectory(), Queues: 256}, "long tag": {Directory: NewDirectory(), Tag: string(make([]byte, 37))},
		"little memory": {Directory: NewDirectory(), ReplyBytes: 4096},
	} {
		if _, err := New(cfg); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	g := start(t, Config{Directory: NewDirectory(), Tag: "images", Queues: 3})
	b := g.fe.Ask(vhosttest.GetConfig, append(vhosttest.U32(0, 40, 0), make([]byte, 40)...))
	want := append(append([]byte("images"), make([]byte, 30)...), 3, 0, 0, 0)
	if !bytes.Equal(b[12:], want) {
		t.Errorf("configuration space: %x", b)
	}
	if n := g.fe.Ask(vhosttest.GetQueueNum, nil); binary.LittleEndian.Uint64(n) != 4 {
		t.Errorf("queues: %x", n)
	}
}

func TestAcceptGivesUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Accept(ctx, l); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := unix.Access(path, unix.F_OK); err == nil {
		t.Error("the socket is still there")
	}
}
