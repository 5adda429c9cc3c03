package service

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/guesttest"
	"github.com/tatami-containers/tatami/virtiofs/hostimages"
)

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// images opens the socket of virtio-fs devices.
func (g *rig) images(t *testing.T) string {
	t.Helper()
	path := filepath.Join(g.dir, "images.sock")
	if err := g.export(nil, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// device is a virtio-fs device with its guest.
type device struct {
	*hostimages.Client
	*guesttest.Guest
	q   *guesttest.Queue
	srv *virtiofs.Server
}

// device runs one for a sandbox until the test ends. Images that are gone vanish
// when nobody has read them for as long as idle.
func (g *rig) device(t *testing.T, sandbox, socket string, idle time.Duration) *device {
	t.Helper()
	dir := virtiofs.NewDirectory()
	d := &device{Client: hostimages.New(hostimages.Config{Directory: dir, Idle: idle,
		Dial: func(ctx context.Context) (*net.UnixConn, error) { return sharedimages.Dial(ctx, socket, sandbox) }})}
	dir.Find = func(name string) { d.Find(name) }
	var err error
	if d.srv, err = virtiofs.New(virtiofs.Config{Directory: dir}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "fs.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { d.Run(ctx) })
	wg.Go(func() {
		c, err := virtiofs.Accept(ctx, l)
		if err == nil {
			err = d.srv.Serve(ctx, c)
		}
		if err != nil {
			t.Errorf("device: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	d.Guest = guesttest.Start(t, path, 2)
	d.q = d.Queues[0]
	return d
}

// bytes is what the node's store says that an image is.
func (g *rig) bytes(t *testing.T, sandbox string, manifest digest.Digest) []byte {
	t.Helper()
	img, err := g.openImage(sandbox, manifest)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	b := make([]byte, img.Describe().Size)
	if _, err := img.ReadAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// pushLazy adds an image of which the node fetches what is read.
func (g *rig) pushLazy(object string, seed byte) {
	var entries []registrytest.Entry
	for n := range 8 {
		b := make([]byte, 300<<10)
		_, _ = rand.NewChaCha8([32]byte{seed, byte(n)}).Read(b) // has no error
		entries = append(entries, registrytest.File(fmt.Sprintf("f%d", n), 0o644, string(b)))
	}
	layer := registrytest.Must(registrytest.EStargz(registrytest.Must(registrytest.Tar(entries...))))
	g.reg.PushImage("library/"+object, "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
}

// A guest reads an image that the node fetches meanwhile, and then has: the bytes
// are the store's, and for those that are there nobody is asked.
func TestDeviceReads(t *testing.T) {
	g := newRig(t)
	g.pushLazy("app", 1)
	socket := g.images(t)
	v := g.attach(t, "one")
	manifest := digest.Digest(g.add(t, v, "c1", "app:v1"))
	d := g.device(t, "one", socket, 0)
	node, size, errno := d.q.Lookup(1, sharedimages.Name(manifest))
	if errno != 0 {
		t.Fatal(errno)
	}
	cold, errno := d.q.ReadAll(node, size)
	if errno != 0 {
		t.Fatal(errno)
	}
	first := d.Client.Stats()
	if first.Reads == 0 || first.Opens != 1 || first.Shares == 0 {
		t.Errorf("cold: %+v", first)
	}
	warm, errno := d.q.ReadAll(node, size)
	if errno != 0 {
		t.Fatal(errno)
	}
	if now := d.Client.Stats(); now != first {
		t.Errorf("warm reads asked: %+v, before %+v", now, first)
	}
	want := g.bytes(t, "one", manifest)
	if !bytes.Equal(cold, want) || !bytes.Equal(warm, want) {
		t.Errorf("%d and %d bytes, or others, of %d", len(cold), len(warm), len(want))
	}
	// Another sandbox of the same image: the node has all.
	w := g.attach(t, "two")
	g.add(t, w, "c2", "app:v1")
	g.reg.Close()
	e := g.device(t, "two", socket, 0)
	node, _, _ = e.q.Lookup(1, sharedimages.Name(manifest))
	if got, errno := e.q.ReadAll(node, size); errno != 0 || !bytes.Equal(got, want) {
		t.Errorf("second sandbox: %v, %d bytes or others", errno, len(got))
	}
	if st := e.Client.Stats(); st.Reads != 0 {
		t.Errorf("second sandbox: %+v", st)
	}
}

// A sandbox opens what was granted to it, from then on, and as long as it is.
func TestDeviceAuthorisation(t *testing.T) {
	g := newRig(t)
	socket := g.images(t)
	g.push("mine:v1", map[string]string{"a": "mine"})
	g.push("theirs:v1", map[string]string{"b": "theirs"})
	early := g.device(t, "one", socket, 0) // before its sandbox
	one, two := g.attach(t, "one"), g.attach(t, "two")
	theirs := digest.Digest(g.add(t, two, "c2", "theirs:v1"))
	prepared, err := g.Prepare(t.Context(), &api.PrepareRequest{Reference: g.ref("mine:v1")})
	if err != nil {
		t.Fatal(err)
	}
	mine := digest.Digest(prepared.ManifestDigest)
	for _, m := range []digest.Digest{mine, theirs, digest.FromString("none")} {
		if node, _, errno := early.q.Lookup(1, sharedimages.Name(m)); errno != syscall.ENOENT {
			t.Errorf("%s is node %d, %v", m, node, errno)
		}
		if _, err := g.openImage("one", m); !errdefs.IsNotFound(err) {
			t.Error(err)
		}
	}
	g.add(t, one, "c1", "mine:v1")
	node, size, errno := early.q.Lookup(1, sharedimages.Name(mine))
	if errno != 0 {
		t.Fatal(errno)
	}
	if _, _, errno := early.q.Lookup(1, sharedimages.Name(theirs)); errno != syscall.ENOENT {
		t.Errorf("another sandbox's: %v", errno)
	}
	want := g.bytes(t, "one", mine)
	if got, errno := early.q.ReadAll(node, size); errno != 0 || !bytes.Equal(got, want) {
		t.Errorf("%v, %d bytes or others", errno, len(got))
	}
}

// A container goes: what is open can be read until nobody does, nothing is opened.
// One that comes meanwhile keeps its image.
func TestDeviceContainerGone(t *testing.T) {
	g := newRig(t)
	socket := g.images(t)
	g.pushLazy("app", 2)
	v := g.attach(t, "one")
	manifest := digest.Digest(g.add(t, v, "c1", "app:v1"))
	want := g.bytes(t, "one", manifest)
	d, name := g.device(t, "one", socket, 0), sharedimages.Name(manifest)
	node, size, _ := d.q.Lookup(1, name)
	box, err := g.find("one")
	if err != nil {
		t.Fatal(err)
	}
	box.remove("c1")
	if _, err := g.openImage("one", manifest); !errdefs.IsNotFound(err) {
		t.Errorf("opened again: %v", err)
	}
	if got, errno := d.q.ReadAll(node, size); errno != 0 || !bytes.Equal(got, want) {
		t.Errorf("%v, %d bytes or others", errno, len(got))
	}
	if _, err := g.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: manifest.String()}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removing what is open: %v", err)
	}
}

// What nobody reads any more is given back; what is granted again stays.
func TestDeviceGivesBack(t *testing.T) {
	g := newRig(t)
	socket := g.images(t)
	g.push("app:v1", map[string]string{"a": "x"})
	v := g.attach(t, "one")
	manifest := digest.Digest(g.add(t, v, "c1", "app:v1"))
	d, name := g.device(t, "one", socket, 20*time.Millisecond), sharedimages.Name(manifest)
	if _, _, errno := d.q.Lookup(1, name); errno != 0 {
		t.Fatal(errno)
	}
	box, err := g.find("one")
	if err != nil {
		t.Fatal(err)
	}
	box.remove("c1")
	eventually(t, "the image is given back", func() bool {
		_, err := g.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: manifest.String()})
		return err == nil
	})
	if _, _, errno := d.q.Lookup(1, name); errno != syscall.ENOENT {
		t.Errorf("after the end: %v", errno)
	}
	g.add(t, v, "c2", "app:v1")
	if _, _, errno := d.q.Lookup(1, name); errno != 0 {
		t.Fatal(errno)
	}
	box.remove("c2")
	g.add(t, v, "c3", "app:v1")
	want := g.bytes(t, "one", manifest)
	eventually(t, "the image is there again", func() bool {
		node, size, errno := d.q.Lookup(1, name)
		if errno != 0 {
			return false
		}
		got, errno := d.q.ReadAll(node, size)
		return errno == 0 && bytes.Equal(got, want)
	})
}

// Detach takes everything away at once, also from reads that wait.
func TestDeviceDetach(t *testing.T) {
	g := newRig(t)
	socket := g.images(t)
	g.pushLazy("app", 3)
	v := g.attach(t, "one")
	manifest := digest.Digest(g.add(t, v, "c1", "app:v1"))
	d := g.device(t, "one", socket, 0)
	node, size, errno := d.q.Lookup(1, sharedimages.Name(manifest))
	if errno != 0 {
		t.Fatal(errno)
	}
	remove := g.reg.Fault("/blobs/", 0, registrytest.Delay(2*patience))
	defer remove()
	asked := len(g.reg.Requests("/blobs/"))
	read := make(chan syscall.Errno, 1)
	go func() {
		_, errno := d.q.ReadAll(node, size)
		read <- errno
	}()
	eventually(t, "a read waits", func() bool { return len(g.reg.Requests("/blobs/")) > asked })
	if _, err := g.Detach(t.Context(), &api.DetachRequest{Sandbox: "one"}); err != nil {
		t.Fatal(err)
	}
	if errno := <-read; errno == 0 {
		t.Error("read to the end")
	}
	if _, err := g.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: manifest.String()}); err != nil {
		t.Errorf("remove: %v", err)
	}
}
