package service

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// peerConn is a connection of a virtual machine, as AF_VSOCK would show it.
type peerConn struct {
	net.Conn
	cid uint32
}

// fakePort accepts what connect gives it.
type fakePort struct {
	conns chan net.Conn
	fails chan error // of Accept
	done  chan struct{}
	once  sync.Once
}

func (f *fakePort) Accept() (net.Conn, error) {
	select {
	case err := <-f.fails:
		return nil, err
	case c := <-f.conns:
		return c, nil
	case <-f.done:
		return nil, net.ErrClosed
	}
}

func (f *fakePort) Close() error   { f.once.Do(func() { close(f.done) }); return nil }
func (f *fakePort) Addr() net.Addr { return &net.UnixAddr{Name: "port"} }

// connect returns the guest's end.
func (f *fakePort) connect(cid uint32) net.Conn {
	guest, host := net.Pipe()
	f.conns <- peerConn{host, cid}
	return guest
}

func newFakePorts() (*ports, func() *fakePort) {
	bound := make(chan *fakePort, 8)
	bind := func(string) (net.Listener, error) {
		f := &fakePort{conns: make(chan net.Conn), fails: make(chan error), done: make(chan struct{})}
		bound <- f
		return f, nil
	}
	peer := func(c net.Conn) (uint32, bool) {
		p, ok := c.(peerConn)
		return p.cid, ok
	}
	return newPorts(bind, peer), func() *fakePort { return <-bound }
}

func closedByPeer(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read from a refused connection: %v", err)
	}
}

// Virtual machines share a port; each connection goes to the sandbox that the
// kernel says it is from, and to no other.
func TestSharedPort(t *testing.T) {
	p, bound := newFakePorts()
	three, err := p.listen("vsock:2111", 3)
	if err != nil {
		t.Fatal(err)
	}
	four, err := p.listen("vsock:2111", 4)
	if err != nil {
		t.Fatal(err)
	}
	port := bound()
	if _, err := p.listen("vsock:2111", 3); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a cid twice: %v", err)
	}
	closedByPeer(t, port.connect(5))
	port.connect(4)
	port.connect(3)
	for want, l := range map[uint32]net.Listener{3: three, 4: four} {
		c, err := l.Accept()
		if err != nil || c.(peerConn).cid != want {
			t.Errorf("accepted %v, %v for cid %d", c, err, want)
		}
	}
	// One that nobody accepts from does not hold up the other.
	var waiting []net.Conn
	for range backlog {
		waiting = append(waiting, port.connect(3))
	}
	closedByPeer(t, port.connect(3))
	port.connect(4)
	if _, err := four.Accept(); err != nil {
		t.Error(err)
	}
	if err := three.Close(); err != nil {
		t.Error(err)
	}
	for _, c := range waiting {
		closedByPeer(t, c)
	}
	closedByPeer(t, port.connect(3))
	if _, err := three.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if err := errors.Join(four.Close(), four.Close()); err != nil {
		t.Error(err)
	}
	<-port.done // closed with its last sandbox
	p.wg.Wait()
	if _, err := p.listen("vsock:2111", 3); err != nil {
		t.Errorf("listen again: %v", err)
	}
	// A port that breaks ends its sandboxes' listeners.
	port = bound()
	_ = port.Close()
	p.wg.Wait()
	if len(p.shared) != 0 {
		t.Error("a broken port is kept")
	}
}

// A port that is kept is open without sandboxes. A connection that is nobody's
// waits while its sandbox is looked for, and there is a bound on how many do.
func TestHeldConnections(t *testing.T) {
	p, bound := newFakePorts()
	look, found := make(chan uint32), make(chan bool)
	p.find = func(cid uint32) bool {
		look <- cid
		return <-found
	}
	if err := errors.Join(p.keep("vsock:2110"), p.keep("vsock:2110")); err != nil {
		t.Fatal(err)
	}
	port := bound()
	port.connect(3)
	<-look
	three, err := p.listen("vsock:2110", 3)
	if err != nil {
		t.Fatal(err)
	}
	found <- true
	if c, err := three.Accept(); err != nil || c.(peerConn).cid != 3 {
		t.Errorf("accepted %v, %v", c, err)
	}
	nobody := port.connect(4)
	<-look
	found <- false
	closedByPeer(t, nobody)
	var waiting []net.Conn
	for range maxHeld {
		waiting = append(waiting, port.connect(5))
		<-look
	}
	closedByPeer(t, port.connect(6))
	for range waiting {
		found <- false
	}
	for _, c := range waiting {
		closedByPeer(t, c)
	}
	// One that has a sandbox is not looked for when the sandbox takes no more.
	for range backlog {
		port.connect(3)
	}
	closedByPeer(t, port.connect(3))
	if err := three.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-port.done:
		t.Error("the port that is kept is closed")
	default:
	}
	p.close()
	<-port.done
}

// A shared port outlives a want of descriptors or memory, which one of its
// sandboxes, or anybody else, may have caused.
func TestSharedPortGoesOn(t *testing.T) {
	p, bound := newFakePorts()
	three, err := p.listen("vsock:2111", 3)
	if err != nil {
		t.Fatal(err)
	}
	port := bound()
	for _, err := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED} {
		port.fails <- &net.OpError{Op: "accept", Net: "vsock", Err: os.NewSyscallError("accept4", err)}
	}
	port.connect(3)
	if c, err := three.Accept(); err != nil || c.(peerConn).cid != 3 {
		t.Errorf("accepted %v, %v", c, err)
	}
	if err := three.Close(); err != nil {
		t.Error(err)
	}
	p.wg.Wait()
}

func TestOwnAddress(t *testing.T) {
	g := newRig(t)
	l, err := g.ports.listen("unix:"+filepath.Join(g.dir, "s"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
