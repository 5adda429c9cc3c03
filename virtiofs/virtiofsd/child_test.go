package virtiofsd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/virtiofs/calls"
)

// both is a parent and its child in one process, without confinement.
func both(t *testing.T, o Options) (*parent, *child) {
	t.Helper()
	o.SharedDir = t.TempDir()
	ours, theirs, err := calls.Pair()
	must(t, err)
	c, err := newChild(theirs, io.Discard)
	must(t, err)
	p := newParent(t.Context(), &o, io.Discard, slog.New(slog.DiscardHandler))
	p.child = &process{files: p.files}
	p.child.Conn, err = calls.New(ours)
	must(t, err)
	p.imgs, err = openImages(o.SharedDir, p.log)
	must(t, err)
	p.child.Start(p.ops().Handle)
	must(t, p.imgs.showTo(p.child))
	t.Cleanup(func() { must(t, errors.Join(p.child.Close(), c.parent.Close(), p.imgs.close())) })
	return p, c
}

func (c *child) names() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.files))
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// The child gets connections to tatami-host as often as it asks, while there is one.
func TestDial(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	_, c := both(t, Options{Images: path, SandboxID: "box"})
	if conn, err := c.dial(within(t)); !errdefs.IsUnavailable(err) {
		t.Errorf("nobody listens: %v, %v", conn, err)
	}
	l, err := net.ListenUnix(sharedimages.Network, &net.UnixAddr{Name: path, Net: sharedimages.Network})
	must(t, err)
	defer l.Close()
	for range 3 {
		peers := make(chan *net.UnixConn, 1)
		go func() { peers <- welcome(t, l) }()
		conn, err := c.dial(within(t))
		must(t, err)
		peer := <-peers
		_, err = conn.Write([]byte("hello"))
		must(t, err)
		b := make([]byte, 100)
		if n, err := peer.Read(b); !bytes.Equal(b[:n], []byte("hello")) {
			t.Errorf("%q, %v", b[:n], err)
		}
		must(t, errors.Join(conn.Close(), peer.Close()))
	}
	_, c = both(t, Options{})
	if conn, err := c.dial(within(t)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without --images: %v, %v", conn, err)
	}
}

// welcome accepts a connection and answers its hello, which the parent sends.
func welcome(t *testing.T, l *net.UnixListener) *net.UnixConn {
	peer, err := l.AcceptUnix()
	if err != nil {
		t.Error(err)
		return nil
	}
	conn, err := sharedimages.NewConn(peer, time.Minute)
	if err != nil {
		t.Error(err)
		return nil
	}
	h, sandbox, _, err := conn.Receive(make([]byte, sharedimages.MaxPacket), false)
	if err != nil || h.Op != sharedimages.Hello || string(sandbox) != "box" {
		t.Errorf("hello %+v for %q, %v", h, sandbox, err)
	}
	if err := conn.Send(&h, nil); err != nil {
		t.Error(err)
	}
	return peer
}

func TestFilesOfTheChild(t *testing.T) {
	p, c := both(t, Options{})
	dir := p.o.SharedDir
	write(t, filepath.Join(dir, "image"), "image")
	c.find("image")
	c.find("none")
	c.find("../image")
	if got := c.names(); !slices.Equal(got, []string{"image"}) {
		t.Fatalf("files: %q", got)
	}
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	if err := p.child.add("directory", 9, f); err == nil {
		t.Error("a directory was added")
	}
	if err := p.child.add("image", 9, p.imgs.files["image"].f); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second time: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "image")))
	must(t, p.imgs.scan())
	if got := c.names(); len(got) != 0 {
		t.Errorf("files after their end: %q", got)
	}
	if err := p.child.remove("image"); !errdefs.IsNotFound(err) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestServeWithoutVMM(t *testing.T) {
	p, _ := both(t, Options{})
	if _, err := p.child.Call(within(t), opServe, serveArgs{}, nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	f, err := os.Open("/dev/null")
	must(t, err)
	defer f.Close()
	if _, err := p.child.Call(within(t), opConnect, nothing{}, nil, f); err == nil {
		t.Error("a device is no connection")
	}
}

func TestNodesOfHostedImages(t *testing.T) {
	p, c := both(t, Options{})
	seen := map[uint64]bool{}
	name := func(i int) string { return sharedimages.Name(digest.FromString(fmt.Sprint(i))) }
	for i := range maxHosted {
		n := c.node(name(i))
		if n <= firstHosted || n >= 1<<48 || seen[n] || n != c.node(name(i)) {
			t.Fatalf("image %d has the node id %d", i, n)
		}
		seen[n] = true
	}
	if names, all := p.hosted.names(); len(names) != maxHosted || !all || !p.replaceable() {
		t.Errorf("%d names, all: %t", len(names), all)
	}
	if n := c.node("../etc/passwd"); n != 0 {
		t.Errorf("what is no image has the node id %d", n)
	}
	if n := c.node(name(maxHosted)); n <= firstHosted || seen[n] || p.replaceable() {
		t.Errorf("one more has the node id %d, replaceable: %t", n, p.replaceable())
	}
}

// A child that does not answer, as one that a guest has taken over, does not keep its
// parent from ending.
func TestSilentChild(t *testing.T) {
	p, _ := both(t, Options{})
	must(t, p.child.Close())
	ours, theirs, err := calls.Pair()
	must(t, err)
	peer, err := unixConn([]*os.File{theirs})
	must(t, err)
	defer peer.Close()
	p.child.Conn, err = calls.New(ours)
	must(t, err)
	p.child.Start(p.ops().Handle)
	stop := p.follow()
	write(t, filepath.Join(p.o.SharedDir, "image"), "image")
	must(t, peer.SetDeadline(time.Now().Add(time.Minute)))
	if _, err := peer.Read(make([]byte, 1000)); err != nil { // the call
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { stop(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the parent waits for its child")
	}
}
