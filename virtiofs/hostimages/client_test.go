package hostimages

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
	"github.com/tatami-containers/tatami/virtiofs"
)

// The client against a real tatami-host is in the tests of host/service and
// host/daemon. Here its other side is the test, which can do what tatami-host never
// does.

const patience = time.Minute

var manifest = digest.FromString("image")

// peer is the other side of a connection.
type peer struct {
	*sharedimages.Conn
	t *testing.T
}

func (p *peer) next() (sharedimages.Header, string) {
	p.t.Helper()
	h, payload, _, err := p.Receive(make([]byte, sharedimages.MaxPacket), true)
	if err != nil {
		p.t.Fatal(err)
	}
	return h, string(payload)
}

// expect receives a request.
func (p *peer) expect(op sharedimages.Op) sharedimages.Header {
	p.t.Helper()
	h, _ := p.next()
	if h.Op != op {
		p.t.Fatalf("request %+v, want %d", h, op)
	}
	return h
}

func (p *peer) answer(h sharedimages.Header, payload []byte, files ...*os.File) {
	p.t.Helper()
	if err := p.Send(&h, payload, files...); err != nil {
		p.t.Fatal(err)
	}
}

// rig is a client whose connections the test accepts.
type rig struct {
	*Client
	t     *testing.T
	dir   string
	conns chan *net.UnixConn // for Dial
	boot  *os.File           // "boot"
	data  *os.File           // of the segment: 8 bytes from 2 on
	state *shared.State      // of the segment: chunks of 4 bytes
}

func start(t *testing.T, limit time.Duration) *rig {
	t.Helper()
	g := &rig{t: t, dir: t.TempDir(), conns: make(chan *net.UnixConn)}
	g.boot, g.data = g.file("boot", "boot"), g.file("data", "--segment!")
	var err error
	if g.state, err = shared.Create(g.dir, "state", 8, []shared.Extent{{Off: 0, End: 4}, {Off: 4, End: 7}}); err != nil {
		t.Fatal(err)
	}
	g.Client = New(Config{Directory: virtiofs.NewDirectory(), Patience: limit, Dial: func(ctx context.Context) (*net.UnixConn, error) {
		select {
		case c := <-g.conns:
			return c, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { g.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return g
}

func (g *rig) file(name, content string) *os.File {
	g.t.Helper()
	path := filepath.Join(g.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		g.t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = f.Close() })
	return f
}

// connect gives the client a connection.
func (g *rig) connect() *peer {
	g.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			g.t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
	}
	if err := ends[1].SetReadDeadline(time.Now().Add(patience)); err != nil {
		g.t.Fatal(err)
	}
	p, err := sharedimages.NewConn(ends[1], patience)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = p.Close() }) // tests may have done so
	g.conns <- ends[0]
	return &peer{p, g.t}
}

// image is an answer to Open.
func image(size int64) []byte {
	o := sharedimages.Opened{Size: size, Boot: 4, Segments: []sharedimages.Segment{{Off: 4, Size: 8}}}
	b, err := o.Encode()
	if err != nil {
		panic(err) // of the test's own constants
	}
	return b
}

// grantLate refuses an image that was open before once, then grants it, and expects
// that it is the same file.
func (g *rig) grantLate(p *peer, f *file) {
	g.t.Helper()
	h := p.expect(sharedimages.Open)
	refused := sharedimages.Header{Op: h.Op, ID: h.ID}
	text := refused.Fail(errdefs.ErrNotFound)
	p.answer(refused, text)
	h = p.expect(sharedimages.Open)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 9}, image(12), g.boot)
	g.awaitOpen(f)
	if g.known() != f {
		g.t.Error("it was dropped")
	}
}

// open has the client open the image.
func (g *rig) open(p *peer) *file {
	g.t.Helper()
	found := make(chan bool, 1)
	go func() { found <- g.Find(sharedimages.Name(manifest)) }()
	h := p.expect(sharedimages.Open)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 5}, image(12), g.boot)
	if !<-found {
		g.t.Fatal("not a name")
	}
	f := g.known()
	if f == nil {
		g.t.Fatal("not opened")
	}
	return f
}

// known is the image, if it is served.
func (g *rig) known() *file {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.files[manifest]
}

// awaitOpen waits until the image is open again.
func (g *rig) awaitOpen(f *file) {
	for {
		g.mu.Lock()
		changed, there := g.changed, f.link != nil
		g.mu.Unlock()
		if there {
			return
		}
		<-changed
	}
}

// share answers the request for a share.
func (g *rig) share(p *peer) {
	g.t.Helper()
	h := p.expect(sharedimages.Share)
	state, err := g.state.Open()
	if err != nil {
		g.t.Fatal(err)
	}
	defer state.Close()
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Off: 2}, nil, state, g.data)
}

// read reads beside.
func (f *file) read(ctx context.Context, off, n int64) func() (string, error) {
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b := make([]byte, n)
		_, err := f.ReadAt(ctx, b, off)
		done <- result{b, err}
	}()
	return func() (string, error) { r := <-done; return string(r.b), r.err }
}

func expectRead(t *testing.T, want string, got func() (string, error)) {
	t.Helper()
	if b, err := got(); b != want || err != nil {
		t.Errorf("%q, %v, want %q", b, err, want)
	}
}

// Bytes come from where they are: the bootstrap, the shared segment, tatami-host.
func TestWhereBytesAre(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	expectRead(t, "oot", f.read(t.Context(), 1, 3))
	g.state.Set(0)
	got := f.read(t.Context(), 2, 9) // "ot", chunk 0, and three bytes that are missing
	g.share(p)
	if h := p.expect(sharedimages.Read); h.Handle != 5 || h.Off != 8 || h.N != 3 {
		t.Errorf("%+v", h)
	} else {
		p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 3}, []byte("xyz"))
	}
	expectRead(t, "otsegmxyz", got)
	g.state.Set(1)
	expectRead(t, "segment", f.read(t.Context(), 4, 7)) // asks for nothing, or hangs
	data, at, n, stamp := f.Map(5)
	if data == nil || at != 3 || n != 7 || !f.Valid(5, stamp) {
		t.Errorf("mapped at %d, %d bytes", at, n)
	}
	g.state.Clear(0)
	g.state.Bump()
	if f.Valid(5, stamp) {
		t.Error("valid after the bytes went")
	}
	if _, _, n, _ := f.Map(5); n != 0 {
		t.Errorf("mapped %d bytes that went", n)
	}
	// The segment moves: the next share is another generation.
	_, _, _, stamp = f.Map(9)
	g.state.Move()
	other, err := shared.Create(g.dir, "state", 8, []shared.Extent{{Off: 0, End: 8}})
	if err != nil {
		t.Fatal(err)
	}
	other.Set(0)
	g.state = other
	got = f.read(t.Context(), 9, 2)
	g.share(p)
	expectRead(t, "nt", got)
	if f.Valid(9, stamp) {
		t.Error("a stamp of another share is valid")
	}
}

// A read that is given up is cancelled, and its answer does no harm.
func TestCancel(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	ctx, cancel := context.WithCancel(t.Context())
	got := f.read(ctx, 4, 4)
	g.share(p)
	h := p.expect(sharedimages.Read)
	cancel()
	if _, err := got(); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
	if c := p.expect(sharedimages.Cancel); c.ID != h.ID {
		t.Errorf("cancelled %d, want %d", c.ID, h.ID)
	}
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, []byte("late"))
	got = f.read(t.Context(), 4, 4)
	h = p.expect(sharedimages.Read)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, []byte("good"))
	expectRead(t, "good", got)
	g.mu.Lock()
	defer g.mu.Unlock()
	if n := len(g.link.room); n != 0 {
		t.Errorf("%d requests without an answer", n)
	}
}

// Reads wait for another connection, on which the image has to be the same.
func TestAnotherConnection(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	got := f.read(t.Context(), 4, 4)
	g.share(p)
	p.expect(sharedimages.Read)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = g.connect()
	h := p.expect(sharedimages.Open) // sandboxes are not known yet
	refused := sharedimages.Header{Op: h.Op, ID: h.ID}
	text := refused.Fail(errdefs.ErrNotFound)
	p.answer(refused, text)
	h = p.expect(sharedimages.Open)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 9}, image(12), g.boot)
	if h = p.expect(sharedimages.Read); h.Handle != 9 {
		t.Errorf("%+v", h)
	}
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, []byte("good"))
	expectRead(t, "good", got)
	for _, other := range []struct {
		payload []byte
		boot    *os.File
	}{{image(13), g.boot}, {image(12), g.file("other", "boot")}} {
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		f.err = nil
		g.mu.Unlock()
		p = g.connect()
		h = p.expect(sharedimages.Open)
		p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 1}, other.payload, other.boot)
		if c := p.expect(sharedimages.Close); c.Handle != 1 {
			t.Errorf("%+v", c)
		} else {
			p.answer(sharedimages.Header{Op: c.Op, ID: c.ID}, nil)
		}
		if _, err := f.read(t.Context(), 4, 4)(); !errdefs.IsDataLoss(err) {
			t.Errorf("another image: %v", err)
		}
	}
}

// When the patience is over, reads fail at once, until tatami-host is back.
func TestPatience(t *testing.T) {
	g := start(t, 100*time.Millisecond)
	p := g.connect()
	f := g.open(p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := f.read(t.Context(), 4, 4)(); !errdefs.IsUnavailable(err) {
			t.Errorf("read: %v", err)
		}
	}
	expectRead(t, "boot", f.read(t.Context(), 0, 4))
	p = g.connect()
	h := p.expect(sharedimages.Open)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 2}, image(12), g.boot)
	g.awaitOpen(f)
	got := f.read(t.Context(), 4, 4)
	g.share(p)
	h = p.expect(sharedimages.Read)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, []byte("good"))
	expectRead(t, "good", got)
}

// Whatever the other side answers, nothing breaks but the connection.
func TestHostileHost(t *testing.T) {
	d := []byte(manifest)
	for name, say := range map[string]func(p *peer, h sharedimages.Header, f *os.File){
		"nobody's answer": func(p *peer, h sharedimages.Header, f *os.File) {
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID + 1}, image(12), f)
		},
		"another op": func(p *peer, h sharedimages.Header, f *os.File) {
			p.answer(sharedimages.Header{Op: sharedimages.Read, ID: h.ID}, d)
		},
		"no file": func(p *peer, h sharedimages.Header, f *os.File) {
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID}, image(12))
		},
		"two files": func(p *peer, h sharedimages.Header, f *os.File) {
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID}, image(12), f, f)
		},
		"refused, file": func(p *peer, h sharedimages.Header, f *os.File) {
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Status: 1}, nil, f)
		},
		"event, file": func(p *peer, h sharedimages.Header, f *os.File) {
			p.answer(sharedimages.Header{Op: sharedimages.Gone}, d, f)
		},
		"event, garbage": func(p *peer, h sharedimages.Header, f *os.File) {
			p.answer(sharedimages.Header{Op: sharedimages.Gone}, []byte("x"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := start(t, patience)
			p := g.connect()
			found := make(chan bool, 1)
			go func() { found <- g.Find(sharedimages.Name(manifest)) }()
			say(p, p.expect(sharedimages.Open), g.boot)
			// The client asks again, on another connection.
			p = g.connect()
			h := p.expect(sharedimages.Open)
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 1}, image(12), g.boot)
			if !<-found || g.Stats().Lost != 1 {
				t.Errorf("%+v", g.Stats())
			}
		})
	}
	for name, open := range map[string]struct {
		payload []byte
		boot    string
	}{"short": {[]byte("x"), "boot"}, "short boot": {image(12), "boo"}, "no fit": {make([]byte, 16*5000), "boot"}} {
		t.Run(name, func(t *testing.T) {
			g := start(t, patience)
			p := g.connect()
			found := make(chan bool, 1)
			go func() { found <- g.Find(sharedimages.Name(manifest)) }()
			h := p.expect(sharedimages.Open)
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID}, open.payload, g.file("hostile", open.boot))
			<-found
			if g.known() != nil {
				t.Error("it is served")
			}
		})
	}
}

// Shares that make no sense are not used; what they were for is asked for. So is
// what a share's file does not have.
func TestBadShares(t *testing.T) {
	g := start(t, patience)
	small, err := shared.Create(g.dir, "small", 4, []shared.Extent{{Off: 0, End: 4}})
	if err != nil {
		t.Fatal(err)
	}
	for _, share := range []func(p *peer, h sharedimages.Header){
		func(p *peer, h sharedimages.Header) {
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID}, nil, g.data, g.data)
		},
		func(p *peer, h sharedimages.Header) {
			state, err := small.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer state.Close()
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID}, nil, state, g.data)
		},
		func(p *peer, h sharedimages.Header) {
			refused := sharedimages.Header{Op: h.Op, ID: h.ID}
			text := refused.Fail(errdefs.ErrFailedPrecondition)
			p.answer(refused, text)
		},
	} {
		p := g.connect()
		f := g.known()
		if f == nil {
			f = g.open(p)
		} else {
			h := p.expect(sharedimages.Open)
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 5}, image(12), g.boot)
			g.awaitOpen(f)
		}
		got := f.read(t.Context(), 4, 4)
		share(p, p.expect(sharedimages.Share))
		for range 2 { // the share is not asked for again
			h := p.expect(sharedimages.Read)
			p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, bytes.Repeat([]byte("x"), 4))
			expectRead(t, "xxxx", got)
			got = f.read(t.Context(), 4, 4)
		}
		h := p.expect(sharedimages.Read)
		p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 1}, []byte("x"))
		if b, err := got(); err == nil {
			t.Errorf("a short answer: %q", b)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// With too many descriptors, bytes are asked for, and images are not there.
func TestDescriptors(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	g.used.Add(g.cfg.Descriptors)
	got := f.read(t.Context(), 4, 4)
	h := p.expect(sharedimages.Read)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, []byte("good"))
	expectRead(t, "good", got)
	g.Find(sharedimages.Name(digest.FromString("other"))) // asks for nothing
	g.used.Add(-g.cfg.Descriptors)
	got = f.read(t.Context(), 4, 4)
	g.state.Set(0)
	g.share(p)
	expectRead(t, "segm", got)
	l, _, _, err := g.look(f)
	if err != nil {
		t.Fatal(err)
	}
	dropped := make(chan struct{})
	go func() {
		defer close(dropped)
		g.drop(t.Context(), l, f)
	}()
	h = p.expect(sharedimages.Close)
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID}, nil)
	<-dropped
	if n := g.used.Load(); n != 0 {
		t.Errorf("%d descriptors stay", n)
	}
}

func TestNames(t *testing.T) {
	g := start(t, patience)
	for _, name := range []string{"", "image", ".tatami", "sha256-x.erofs"} {
		if g.Find(name) {
			t.Errorf("%q is the name of an image", name)
		}
	}
}

// An image that is opened for nobody, who has given up, is given back.
func TestOpenedForNobody(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	found := make(chan bool, 1)
	go func() { found <- g.Find(sharedimages.Name(manifest)) }()
	h := p.expect(sharedimages.Open)
	if c := p.expect(sharedimages.Cancel); c.ID != h.ID || !<-found || g.known() != nil {
		t.Errorf("%+v", c)
	}
	p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 7}, image(12), g.boot)
	c := p.expect(sharedimages.Close)
	if c.Handle != 7 {
		t.Errorf("%+v", c)
	}
	p.answer(sharedimages.Header{Op: c.Op, ID: c.ID}, nil)
	g.open(p)
}

// An image that was open before, on this connection or another one, is shared anew,
// also when there are no more descriptors than those of the old share.
func TestShareAfterReopen(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	g.state.Set(0)
	got := f.read(t.Context(), 4, 4)
	g.share(p)
	expectRead(t, "segm", got)
	g.cfg.Descriptors = g.used.Load()
	for _, lost := range []bool{false, true} {
		g.state.Kill() // nobody has it open
		var err error
		if g.state, err = shared.Create(g.dir, "state", 8, []shared.Extent{{Off: 0, End: 8}}); err != nil {
			t.Fatal(err)
		}
		g.state.Set(0)
		got = f.read(t.Context(), 4, 4)
		if h := p.expect(sharedimages.Read); lost {
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			p = g.connect()
		} else {
			refused := sharedimages.Header{Op: h.Op, ID: h.ID}
			text := refused.Fail(errdefs.ErrNotFound)
			p.answer(refused, text)
		}
		h := p.expect(sharedimages.Open)
		p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, Handle: 8}, image(12), g.boot)
		if h = p.expect(sharedimages.Read); h.Handle != 8 {
			t.Errorf("%+v", h)
		}
		p.answer(sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, []byte("segm"))
		expectRead(t, "segm", got)
		got = f.read(t.Context(), 4, 4)
		g.share(p)
		expectRead(t, "segm", got)
	}
}

// An image that was not granted for a while, before another container came that has it,
// is waited for when tatami-host is started anew.
func TestGrantedAgain(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	p.answer(sharedimages.Header{Op: sharedimages.Gone}, []byte(manifest))
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = g.connect()
	g.grantLate(p, f)
}

// After a long time without tatami-host, an image that is not granted at once is
// waited for as if it had been a short one.
func TestGrantedLate(t *testing.T) {
	const limit = 300 * time.Millisecond
	g := start(t, limit)
	p := g.connect()
	f := g.open(p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(limit)
	p = g.connect()
	g.grantLate(p, f)
}

// Bytes that go while they are read out of the node's file do not count.
func TestBytesThatGo(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	g.state.Set(0)
	got := f.read(t.Context(), 4, 4)
	g.share(p)
	expectRead(t, "segm", got)
	data, err := os.OpenFile(g.data.Name(), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	stop := make(chan struct{})
	var store sync.WaitGroup
	store.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			g.state.Clear(0)
			g.state.Bump()
			_, zeroed := data.WriteAt(make([]byte, 4), 2)
			_, written := data.WriteAt([]byte("segm"), 2)
			if zeroed != nil || written != nil {
				t.Error(zeroed, written)
				return
			}
			g.state.Set(0)
		}
	})
	b := make([]byte, 4)
	for range 300_000 {
		if n := f.local(b, 4); n > 0 && string(b[:n]) != "segm"[:n] {
			t.Errorf("%q", b[:n])
			break
		}
	}
	close(stop)
	store.Wait()
}

// Of an image that tatami-host does not share any more because it is forged, nothing
// is read that tatami-host does not answer.
func TestForged(t *testing.T) {
	g := start(t, patience)
	p := g.connect()
	f := g.open(p)
	g.state.Set(0)
	got := f.read(t.Context(), 4, 4)
	g.share(p)
	expectRead(t, "segm", got)
	g.state.Move()
	got = f.read(t.Context(), 4, 4)
	for _, op := range []sharedimages.Op{sharedimages.Share, sharedimages.Read} {
		h := p.expect(op)
		refused := sharedimages.Header{Op: h.Op, ID: h.ID}
		text := refused.Fail(errdefs.ErrDataLoss)
		p.answer(refused, text)
	}
	if _, err := got(); !errdefs.IsDataLoss(err) {
		t.Errorf("read: %v", err)
	}
	if _, _, n, _ := f.Map(0); n != 0 {
		t.Errorf("%d bytes of the bootstrap are mapped", n)
	}
	got = f.read(t.Context(), 0, 4)
	if h := p.expect(sharedimages.Read); h.Off != 0 || h.N != 4 {
		t.Errorf("%+v", h)
	} else {
		refused := sharedimages.Header{Op: h.Op, ID: h.ID}
		text := refused.Fail(errdefs.ErrDataLoss)
		p.answer(refused, text)
	}
	if _, err := got(); !errdefs.IsDataLoss(err) {
		t.Errorf("read of the bootstrap: %v", err)
	}
}

// What tatami-host cannot reach is asked for again, as long as there is patience.
func TestOutage(t *testing.T) {
	for patient, limit := range map[bool]time.Duration{true: patience, false: 50 * time.Millisecond} {
		g := start(t, limit)
		p := g.connect()
		f := g.open(p)
		got := f.read(t.Context(), 4, 4)
		g.share(p)
		answers := make(chan int)
		go func() {
			n := 0
			defer func() { answers <- n }()
			for ; ; n++ {
				h, _, _, err := p.Receive(make([]byte, sharedimages.MaxPacket), false)
				if err != nil {
					return
				}
				answer, payload := sharedimages.Header{Op: h.Op, ID: h.ID, N: 4}, []byte("good")
				if n < 3 || !patient {
					payload = answer.Fail(errdefs.ErrUnavailable)
				}
				if p.Send(&answer, payload) != nil {
					return
				}
			}
		}()
		if patient {
			expectRead(t, "good", got)
		} else if _, err := got(); !errdefs.IsUnavailable(err) {
			t.Errorf("read: %v", err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if n := <-answers; n < 2 || patient && n != 4 {
			t.Errorf("asked %d times", n)
		}
	}
}
