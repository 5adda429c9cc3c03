package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

const patience = time.Minute

// stock is what sandboxes may open: an image of size bytes, all of them 7, the
// first 10 of which are its bootstrap, before one segment.
type stock struct {
	dir     string
	size    int64
	holding atomic.Bool // reads wait for hold
	hold    chan struct{}
	waiting atomic.Int64 // reads
	peak    atomic.Int64 // of waiting
	opens   atomic.Int64 // images that are open
	left    atomic.Int64 // calls of Left
	inOrder atomic.Bool  // as the last one said

	mu      sync.Mutex
	granted map[string]digest.Digest // by sandbox; protected by mu
	flow    *sched.Flow              // protected by mu
	asked   chan *sched.Work         // when set, gets that of each read; protected by mu
}

func (s *stock) open(sandbox string, d digest.Digest) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.granted[sandbox] != d {
		return nil, fmt.Errorf("image %s: %w", d, errdefs.ErrNotFound)
	}
	s.opens.Add(1)
	return stockImage{s}, nil
}

func (s *stock) grant(sandbox string, d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.granted[sandbox] = d
}

type stockImage struct{ *stock }

func (i stockImage) Describe() sharedimages.Opened {
	return sharedimages.Opened{Size: i.size, Boot: 10, Segments: []sharedimages.Segment{{Off: 10, Size: i.size - 10}}}
}

func (i stockImage) Boot() (*os.File, error) { return os.Open(filepath.Join(i.dir, "boot")) }

func (i stockImage) Share(int) (state, data *os.File, off int64, err error) {
	state, serr := i.Boot()
	data, derr := i.Boot()
	return state, data, 3, errors.Join(serr, derr)
}

func (i stockImage) ReadAt(ctx context.Context, p []byte, _ int64) (int, error) {
	if _, asked := i.whose(); asked != nil {
		asked <- sched.From(ctx)
	}
	now := i.waiting.Add(1)
	defer i.waiting.Add(-1)
	for m := i.peak.Load(); now > m && !i.peak.CompareAndSwap(m, now); m = i.peak.Load() {
	}
	if i.holding.Load() {
		select {
		case <-i.hold:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	for n := range p {
		p[n] = 7
	}
	return len(p), nil
}

func (i stockImage) Flow() *sched.Flow {
	f, _ := i.whose()
	return f
}

func (s *stock) whose() (*sched.Flow, chan *sched.Work) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flow, s.asked
}

func (i stockImage) Close() { i.opens.Add(-1) }

var theImage = digest.FromString("image")

// rig is a server with its stock.
type rig struct {
	*Server
	*stock
	t    *testing.T
	path string
}

func start(t *testing.T, cfg Config) *rig {
	t.Helper()
	g := &rig{t: t, stock: &stock{dir: t.TempDir(), size: 1 << 20, hold: make(chan struct{}), granted: map[string]digest.Digest{"box": theImage}}}
	if err := os.WriteFile(filepath.Join(g.dir, "boot"), []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Open = g.open
	cfg.Left = func(_ string, inOrder bool) { g.inOrder.Store(inOrder); g.left.Add(1) }
	g.Server = New(cfg)
	g.path = filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix(sharedimages.Network, &net.UnixAddr{Net: sharedimages.Network, Name: g.path})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Close()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		if n := g.opens.Load(); n != 0 {
			t.Errorf("%d images stay open", n)
		}
	})
	return g
}

func (g *rig) Close() { g.Server.Close() }

// peer speaks for a device.
type peer struct {
	*sharedimages.Conn
	t  *testing.T
	c  *net.UnixConn
	id uint32
}

func (g *rig) dial(sandbox string) *peer {
	g.t.Helper()
	c, err := sharedimages.Dial(g.t.Context(), g.path, sandbox)
	if err != nil {
		g.t.Fatal(err)
	}
	return g.peer(c)
}

func (g *rig) peer(c *net.UnixConn) *peer {
	g.t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		g.t.Fatal(err)
	}
	conn, err := sharedimages.NewConn(c, patience)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = conn.Close() })
	return &peer{Conn: conn, t: g.t, c: c}
}

// ask sends a request and returns its ID.
func (p *peer) ask(h sharedimages.Header, payload string) uint32 {
	p.t.Helper()
	p.id++
	h.ID = p.id
	if err := p.Send(&h, []byte(payload)); err != nil {
		p.t.Fatal(err)
	}
	return p.id
}

// next receives a message; files are closed.
func (p *peer) next() (h sharedimages.Header, payload []byte, files int, err error) {
	h, payload, fs, err := p.Receive(make([]byte, sharedimages.MaxPacket), true)
	for _, f := range fs {
		_ = f.Close()
	}
	if err == nil {
		err = h.Err(payload)
	}
	return h, payload, len(fs), err
}

func (p *peer) do(h sharedimages.Header, payload string) (sharedimages.Header, []byte, int, error) {
	p.t.Helper()
	id := p.ask(h, payload)
	h, b, n, err := p.next()
	if h.ID != id {
		p.t.Errorf("answer %+v to request %d", h, id)
	}
	return h, b, n, err
}

func (p *peer) open() uint32 {
	p.t.Helper()
	h, payload, files, err := p.do(sharedimages.Header{Op: sharedimages.Open}, theImage.String())
	if _, derr := sharedimages.DecodeOpened(payload); err != nil || derr != nil || files != 1 {
		p.t.Fatalf("open: %+v, %d files, %v, %v", h, files, err, derr)
	}
	return h.Handle
}

// closed waits until the server has closed the connection.
func (p *peer) closed() {
	p.t.Helper()
	for {
		_, _, _, err := p.next()
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				p.t.Error("the connection stays")
			}
			return
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// What a device gets of the store it cannot open again for writing, as root.
func TestFilesAreReadOnly(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts")
	}
	g := start(t, Config{})
	p := g.dial("box")
	p.ask(sharedimages.Header{Op: sharedimages.Open}, theImage.String())
	h, _, boot, err := p.Receive(make([]byte, sharedimages.MaxPacket), true)
	if err != nil || len(boot) != 1 {
		t.Fatal(boot, err)
	}
	p.ask(sharedimages.Header{Op: sharedimages.Share, Handle: h.Handle}, "")
	_, _, share, err := p.Receive(make([]byte, sharedimages.MaxPacket), true)
	if err != nil || len(share) != 2 {
		t.Fatal(share, err)
	}
	for i, f := range append(boot, share...) {
		path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		if w, err := os.OpenFile(path, os.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
			t.Errorf("descriptor %d for writing: %v, %v", i, w, err)
		}
		if err := errors.Join(unix.Chmod(path, 0o777), os.Truncate(path, 0)); !errors.Is(err, unix.EROFS) {
			t.Errorf("descriptor %d is changed: %v", i, err)
		}
		b, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil || string(b[:10]) != "0123456789" {
			t.Errorf("descriptor %d mapped: %v", i, err)
		}
		if err := errors.Join(unix.Munmap(b), f.Close()); err != nil {
			t.Error(err)
		}
	}
}

func TestRequests(t *testing.T) {
	g := start(t, Config{})
	p := g.dial("box")
	if _, _, _, err := p.do(sharedimages.Header{Op: sharedimages.Open}, digest.FromString("other").String()); !errdefs.IsNotFound(err) {
		t.Errorf("another image: %v", err)
	}
	handle := p.open()
	if h, _, files, err := p.do(sharedimages.Header{Op: sharedimages.Share, Handle: handle}, ""); err != nil || files != 2 || h.Off != 3 {
		t.Errorf("share: %+v, %d files, %v", h, files, err)
	}
	h, b, _, err := p.do(sharedimages.Header{Op: sharedimages.Read, Handle: handle, Off: g.size - 5, N: 5}, "")
	if err != nil || string(b) != "\a\a\a\a\a" || h.N != 5 {
		t.Errorf("read: %+v %q, %v", h, b, err)
	}
	for name, tc := range map[string]struct {
		h    sharedimages.Header
		want func(error) bool
	}{
		"segment":   {sharedimages.Header{Op: sharedimages.Share, Handle: handle, N: 1}, errdefs.IsInvalidArgument},
		"segments":  {sharedimages.Header{Op: sharedimages.Share, Handle: handle, N: 1<<32 - 1}, errdefs.IsInvalidArgument},
		"end":       {sharedimages.Header{Op: sharedimages.Read, Handle: handle, Off: g.size - 4, N: 5}, errdefs.IsInvalidArgument},
		"far":       {sharedimages.Header{Op: sharedimages.Read, Handle: handle, Off: 1<<63 - 1, N: 5}, errdefs.IsInvalidArgument},
		"long":      {sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: sharedimages.MaxData + 1}, errdefs.IsInvalidArgument},
		"no handle": {sharedimages.Header{Op: sharedimages.Read, Handle: handle + 1, N: 5}, errdefs.IsNotFound},
		"no share":  {sharedimages.Header{Op: sharedimages.Share, Handle: handle + 1}, errdefs.IsNotFound},
		"no close":  {sharedimages.Header{Op: sharedimages.Close, Handle: handle + 1}, errdefs.IsNotFound},
	} {
		if _, _, _, err := p.do(tc.h, ""); !tc.want(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, _, err := p.do(sharedimages.Header{Op: sharedimages.Close, Handle: handle}, ""); err != nil || g.opens.Load() != 0 {
		t.Errorf("close: %v, %d open", err, g.opens.Load())
	}
	p.open() // which the end of the connection closes
	if !g.Connected("box") || g.Connected("other") {
		t.Error("who is connected is wrong")
	}
	p.ask(sharedimages.Header{Op: sharedimages.Bye}, "")
	eventually(t, "the device has left", func() bool { return g.left.Load() == 1 && g.inOrder.Load() && !g.Connected("box") })
	q := g.dial("box")
	if err := q.Conn.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "the device is lost", func() bool { return g.left.Load() == 2 && !g.inOrder.Load() })
}

// Whoever breaks the rules loses the connection, and nothing else happens.
func TestHostileDevices(t *testing.T) {
	g := start(t, Config{})
	good := g.dial("box")
	handle := good.open()
	for name, offend := range map[string]func(p *peer){
		"hello again": func(p *peer) { p.ask(sharedimages.Header{Op: sharedimages.Hello, N: sharedimages.Version}, "other") },
		"an event":    func(p *peer) { p.ask(sharedimages.Header{Op: sharedimages.Gone}, theImage.String()) },
		"no digest":   func(p *peer) { p.ask(sharedimages.Header{Op: sharedimages.Open}, "../../etc") },
		"garbage": func(p *peer) {
			if _, err := p.c.Write([]byte("garbage")); err != nil {
				t.Error(err)
			}
		},
		"long": func(p *peer) { p.ask(sharedimages.Header{Op: sharedimages.Open}, string(make([]byte, maxRequest))) },
		"a file": func(p *peer) {
			if err := p.Send(&sharedimages.Header{Op: sharedimages.Close}, nil, os.Stdin); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := g.dial("box")
			p.open()
			offend(p)
			p.closed()
		})
	}
	if _, b, _, err := good.do(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 5}, ""); err != nil || len(b) != 5 {
		t.Errorf("another one: %v", err)
	}
	for name, hello := range map[string]struct {
		h       sharedimages.Header
		sandbox string
	}{
		"version": {sharedimages.Header{Op: sharedimages.Hello, N: sharedimages.Version + 1}, "box"},
		"no box":  {sharedimages.Header{Op: sharedimages.Hello, N: sharedimages.Version}, ""},
		"nothing": {sharedimages.Header{Op: sharedimages.Open}, theImage.String()},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.DialUnix(sharedimages.Network, nil, &net.UnixAddr{Net: sharedimages.Network, Name: g.path})
			if err != nil {
				t.Fatal(err)
			}
			p := g.peer(c)
			p.ask(hello.h, hello.sandbox)
			p.closed()
		})
	}
	// One request twice at a time.
	g.holding.Store(true)
	p := g.dial("box")
	handle = p.open()
	p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 1}, "")
	p.id--
	p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 1}, "")
	p.closed()
}

func TestBounds(t *testing.T) {
	g := start(t, Config{Requests: 3})
	g.holding.Store(true)
	p := g.dial("box")
	for range maxOpens {
		p.open()
	}
	if _, _, _, err := p.do(sharedimages.Header{Op: sharedimages.Open}, theImage.String()); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one open too many: %v", err)
	}
	others := []*peer{p}
	for len(others) < maxBoxConns {
		others = append(others, g.dial("box"))
	}
	if c, err := sharedimages.Dial(t.Context(), g.path, "box"); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one connection too many: %v, %v", c, err)
	}
	q := others[1]
	handle := q.open()
	const reads = 30
	for range reads / 2 {
		p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: 1, N: 10}, "")
		q.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 10}, "")
	}
	eventually(t, "reads wait", func() bool { return g.waiting.Load() == 3 })
	close(g.hold)
	for range reads / 2 {
		for _, from := range []*peer{p, q} {
			if _, b, _, err := from.next(); err != nil || len(b) != 10 {
				t.Errorf("read %q, %v", b, err)
			}
		}
	}
	if n := g.peak.Load(); n != 3 {
		t.Errorf("%d reads at a time", n)
	}
}

// A request that is cancelled has its answer at once and leaves nothing.
func TestCancel(t *testing.T) {
	g := start(t, Config{Requests: 1})
	g.holding.Store(true)
	p := g.dial("box")
	handle := p.open()
	at := p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 10}, "")
	eventually(t, "the read is at work", func() bool { return g.waiting.Load() == 1 })
	queued := p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 10}, "")
	for _, id := range []uint32{queued, at, 12345} { // the last is none
		if err := p.Send(&sharedimages.Header{Op: sharedimages.Cancel, ID: id}, nil); err != nil {
			t.Fatal(err)
		}
		if id == 12345 {
			break
		}
		if h, _, _, err := p.next(); h.ID != id || !errors.Is(err, context.Canceled) {
			t.Errorf("answer %+v, %v; want %d cancelled", h, err, id)
		}
	}
	eventually(t, "nothing is read", func() bool { return g.waiting.Load() == 0 })
	// Neither does a device that leaves.
	p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 10}, "")
	eventually(t, "the read is at work", func() bool { return g.waiting.Load() == 1 })
	if err := p.Conn.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is open", func() bool { return g.opens.Load() == 0 && g.waiting.Load() == 0 })
}

// A device that takes nothing loses its connection and holds up no other one.
func TestStalledDevice(t *testing.T) {
	g := start(t, Config{Requests: 2, Stall: 100 * time.Millisecond})
	g.grant("other", theImage)
	p, q := g.dial("box"), g.dial("other")
	handle, other := p.open(), q.open()
	for range 100 {
		p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: sharedimages.MaxData}, "")
	}
	if _, _, _, err := q.do(sharedimages.Header{Op: sharedimages.Read, Handle: other, N: 10}, ""); err != nil {
		t.Errorf("beside a device that stalls: %v", err)
	}
	eventually(t, "the device is lost", func() bool { return g.left.Load() == 1 && !g.inOrder.Load() })
	g.Gone("box", theImage) // has nobody to tell
}

// The end of a grant is told, and that of a sandbox ends what is open.
func TestGoneAndDrop(t *testing.T) {
	g := start(t, Config{})
	g.holding.Store(true)
	p := g.dial("box")
	handle := p.open()
	g.Gone("box", digest.FromString("other")) // which nobody has open
	g.Gone("box", theImage)
	gone := func() {
		t.Helper()
		if h, payload, _, err := p.next(); err != nil || h.Op != sharedimages.Gone || string(payload) != theImage.String() {
			t.Errorf("%+v %q, %v", h, payload, err)
		}
	}
	gone()
	p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 10}, "")
	eventually(t, "the read is at work", func() bool { return g.waiting.Load() == 1 })
	g.Drop("box")
	if g.opens.Load() != 0 || g.waiting.Load() != 0 {
		t.Error("Drop returned while an image was open")
	}
	for range 2 { // in any order
		switch h, _, _, err := p.next(); h.Op {
		case sharedimages.Gone:
		case sharedimages.Read:
			if !errdefs.IsNotFound(err) {
				t.Errorf("read of a sandbox that is over: %v", err)
			}
		default:
			t.Errorf("%+v, %v", h, err)
		}
	}
	if !g.Connected("box") {
		t.Error("the connection is gone, too")
	}
}

// Only the administrator and this user may connect.
func TestOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: connects as another user")
	}
	g := start(t, Config{})
	for path, mode := range map[string]os.FileMode{g.path: 0o666, filepath.Dir(g.path): 0o755, filepath.Dir(filepath.Dir(g.path)): 0o755} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	fd := make(chan int)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		const nobody = 65534
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody)
		c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(c, &unix.SockaddrUnix{Name: g.path})
		}
		if errno != 0 || err != nil {
			t.Errorf("connect as another user: %v, %v", errno, err)
		}
		fd <- c
	}()
	f := os.NewFile(uintptr(<-fd), "other user")
	c, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	p := g.peer(c.(*net.UnixConn))
	_ = p.Send(&sharedimages.Header{Op: sharedimages.Hello, N: sharedimages.Version}, []byte("box")) // it may be closed already
	if h, _, _, err := p.next(); err == nil {
		t.Errorf("answered %+v", h)
	}
	if g.Connected("box") {
		t.Error("another user is connected")
	}
}

// A device gets no error for what is broken off because its connection ends.
func TestEndIsNoAnswer(t *testing.T) {
	g := start(t, Config{Requests: 1})
	p := g.dial("box")
	handle := p.open()
	g.holding.Store(true)
	for range 3 { // one is at work, two wait for their turn
		p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 10}, "")
	}
	eventually(t, "a read is at work", func() bool { return g.waiting.Load() == 1 })
	for _, c := range g.conns("box") {
		eventually(t, "all requests are there", func() bool { return len(c.room) == 3 })
		c.cancel()
		eventually(t, "they are broken off", func() bool { return len(c.room) == 0 })
	}
	g.Close()
	if h, _, _, err := p.next(); !errors.Is(err, io.EOF) {
		t.Errorf("%+v, %v", h, err)
	}
}

// A read is the work of whom the image is open for, and its bytes wait for their turn.
func TestReadIsWork(t *testing.T) {
	turns, err := sched.New(sched.Config{})
	if err != nil {
		t.Fatal(err)
	}
	g := start(t, Config{Queue: turns.Relay()})
	flow, asked := turns.Flow("batch", "box"), make(chan *sched.Work, 1)
	g.stock.mu.Lock()
	g.flow, g.asked = flow, asked
	g.stock.mu.Unlock()
	p := g.dial("box")
	handle := p.open()
	var leaves []func()
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		leave, err := turns.Relay().Enter(ctx)
		cancel()
		if err != nil {
			break
		}
		leaves = append(leaves, leave)
	}
	id := p.ask(sharedimages.Header{Op: sharedimages.Read, Handle: handle, N: 100}, "")
	w := <-asked
	if got := w.Standing(); got != (sched.Standing{Flow: flow}) {
		t.Errorf("%s of class %q", got.Rank, got.Flow.Class().Name)
	}
	for end := time.Now().Add(patience); !w.Waiting(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the answer does not wait")
		}
	}
	for _, leave := range leaves {
		leave()
	}
	if h, b, _, err := p.next(); err != nil || h.ID != id || len(b) != 100 {
		t.Errorf("%+v: %d bytes, %v", h, len(b), err)
	}
}
