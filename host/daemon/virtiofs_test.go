package daemon

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/virtiofs/guesttest"
)

// node makes one call on the control socket.
func (h *host) node(call func(api.NodeService) error) {
	h.t.Helper()
	var c *ttrpc.Client
	eventually(h.t, "the control socket", func() bool { c = h.control(); return c != nil })
	defer c.Close()
	check(h.t, call(api.NewNodeClient(c)))
}

// attach attaches a sandbox that has one container of an image.
func (h *host) attach(sandbox string, img image) {
	h.t.Helper()
	h.node(func(n api.NodeService) error {
		_, err := n.Attach(h.t.Context(), &api.AttachRequest{Sandbox: sandbox,
			HostAddress: "unix:" + filepath.Join(h.dir, sandbox+".host"), RelayAddress: "unix:" + filepath.Join(h.dir, sandbox+".relay")})
		return err
	})
	h.node(func(n api.NodeService) error {
		_, err := n.AddContainer(h.t.Context(), &api.AddContainerRequest{Sandbox: sandbox, ContainerId: sandbox + "-c", Reference: img.ref})
		return err
	})
}

// virtioFS is what the status says of a sandbox's device.
func (h *host) virtioFS(sandbox string) string {
	h.t.Helper()
	for _, b := range h.status().Sandboxes {
		if b.Id == sandbox {
			return b.VirtioFs
		}
	}
	h.t.Fatalf("the status has no sandbox %s", sandbox)
	return ""
}

// device is tatami-virtiofsd with its guest.
type device struct {
	*guesttest.Guest
	cmd *exec.Cmd
}

// device starts the program for a sandbox, as Kata's runtime-rs does.
func (h *host) device(sandbox string, extra ...string) *device {
	h.t.Helper()
	bin := filepath.Join(h.t.TempDir(), "tatami-virtiofsd")
	build := exec.CommandContext(h.t.Context(), "go", "build", "-o", bin, "../../virtiofs/cmd/tatami-virtiofsd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		h.t.Fatalf("go build: %v\n%s", err, out)
	}
	socket, shared := filepath.Join(h.dir, sandbox+".fs"), filepath.Join(h.dir, "shared", "sandboxes", sandbox, "ro")
	check(h.t, os.MkdirAll(shared, 0o700))
	args := append([]string{"--socket-path", socket, "--shared-dir", shared, "--cache", "auto", "--images", filepath.Join(h.root(), "images.sock")}, extra...)
	d := &device{cmd: exec.CommandContext(h.t.Context(), bin, args...)}
	stderr, err := d.cmd.StderrPipe()
	must(h.t, err, d.cmd.Start())
	lines := bufio.NewReader(stderr)
	var said []string
	for !strings.Contains(strings.Join(said, ""), "Waiting for vhost-user socket connection") {
		line, err := lines.ReadString('\n')
		if err != nil {
			h.t.Fatalf("tatami-virtiofsd ended: %v: %s", err, said)
		}
		said = append(said, line)
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for line, err := lines.ReadString('\n'); err == nil; line, err = lines.ReadString('\n') {
			said = append(said, line)
		}
	}()
	h.t.Cleanup(func() {
		_ = d.cmd.Process.Kill() // it may have ended
		<-drained
		_ = d.cmd.Wait() // killed
		if h.t.Failed() {
			h.t.Logf("tatami-virtiofsd of %s:\n%s", sandbox, strings.Join(said, ""))
		}
	})
	d.Guest = guesttest.Start(h.t, socket, 4)
	return d
}

// end closes the VMM's connection, at which the program ends.
func (d *device) end(t *testing.T) {
	t.Helper()
	check(t, d.Frontend.Conn.Close())
	eventually(t, "tatami-virtiofsd ends", func() bool {
		_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", d.cmd.Process.Pid)) // a zombie has none
		return err != nil
	})
}

// lookup finds an image's file.
func (d *device) lookup(t *testing.T, img image) (node uint64, size int64) {
	t.Helper()
	eventually(t, "the image is there", func() bool {
		var errno syscall.Errno
		node, size, errno = d.Queues[0].Lookup(1, sharedimages.Name(img.manifest))
		return errno == 0
	})
	return node, size
}

// checkImage holds the bytes of an image's file against the files of its layers,
// which lie in it as they are.
func (i image) checkImage(t *testing.T, b []byte, n int) {
	t.Helper()
	for n := range n {
		name, seed := i.file(n)
		if !bytes.Contains(b, []byte(noise(seed))) {
			t.Errorf("the image does not have what %s has", name)
		}
	}
}

// As the virtio-fs daemon of Kata, the program shows the shared directory, and the
// images beside.
func TestDeviceBesideDirectories(t *testing.T) {
	h := newHost(t, session.Auto, share)
	h.start()
	img := h.pushSlow("app", 4)
	h.attach("box", img)
	shared := filepath.Join(h.dir, "shared", "sandboxes", "box", "ro")
	must(t, os.MkdirAll(shared, 0o700), os.WriteFile(filepath.Join(shared, "hosts"), []byte("127.0.0.1 localhost"), 0o600))
	d := h.device("box", "--passthrough")
	q := d.Queues[0]
	if _, size, errno := q.Lookup(1, "hosts"); size != 19 || errno != 0 {
		t.Errorf("a file of the directory: %d bytes, %v", size, errno)
	}
	if _, _, errno := q.Lookup(1, sharedimages.Name(img.manifest)); errno != syscall.ENOENT {
		t.Errorf("the image is in the directory itself: %v", errno)
	}
	dir, _, errno := q.Lookup(1, sharedimages.Dir)
	if errno != 0 {
		t.Fatal(errno)
	}
	var node uint64
	var size int64
	eventually(t, "the image is there", func() bool {
		node, size, errno = q.Lookup(dir, sharedimages.Name(img.manifest))
		return errno == 0
	})
	b, errno := q.ReadAll(node, size)
	if errno != 0 {
		t.Fatal(errno)
	}
	img.checkImage(t, b, layers*files)
	d.end(t)
}

// A guest reads its image over virtio-fs while what it reads is fetched, and
// workers and supervisors are killed and replaced: it waits, and gets the right
// bytes. Then all bytes are there.
func TestDeviceOutlivesHost(t *testing.T) {
	h := newHost(t, session.Auto, share)
	h.start()
	img := h.pushSlow("app", 40)
	h.attach("box", img)
	d := h.device("box")
	node, size := d.lookup(t, img)
	if got := h.virtioFS("box"); got != "connected" {
		t.Errorf("status: %q", got)
	}
	// Cold reads, each of which takes a while.
	remove := h.reg.Fault("/app/blobs/", 0, registrytest.Delay(slowness/4))
	var wg sync.WaitGroup
	var reads atomic.Int64
	parts := make([][]byte, len(d.Queues))
	for i, q := range d.Queues {
		wg.Go(func() {
			const piece = 48 << 10
			for off := int64(i) * piece; off < size; off += int64(len(d.Queues)) * piece {
				b, errno := q.Read(node, off, piece)
				if errno != 0 {
					t.Errorf("read at %d: %v", off, errno)
					return
				}
				parts[i] = append(parts[i], b...)
				reads.Add(1)
				time.Sleep(pause)
			}
		})
	}
	pid := h.awaitWorker(0)
	for n, change := range []func(){
		func() { check(t, syscall.Kill(pid, syscall.SIGKILL)) },
		func() { check(t, h.cmd.Process.Signal(syscall.SIGHUP)) },
		func() { h.end(syscall.SIGTERM); h.start() },
		func() { h.end(syscall.SIGKILL); h.start() },
	} {
		before := reads.Load()
		change()
		if n < 2 {
			pid = h.awaitWorker(pid)
		}
		eventually(t, "reads go on, or are done", func() bool { return reads.Load() >= before+4 || reads.Load() == (size+48<<10-1)/(48<<10) })
		eventually(t, "the device is connected again", func() bool { return h.virtioFS("box") == "connected" })
	}
	remove()
	wg.Wait()
	all, errno := d.Queues[0].ReadAll(node, size)
	if errno != 0 {
		t.Fatalf("read all: %v", errno)
	}
	img.checkImage(t, all, layers*files)
	for i := range parts {
		const piece = 48 << 10
		for at, off := 0, int64(i)*piece; at < len(parts[i]); at, off = at+piece, off+int64(len(d.Queues))*piece {
			b := parts[i][at:min(at+piece, len(parts[i]))]
			if !bytes.Equal(b, all[off:off+int64(len(b))]) {
				t.Errorf("other bytes at %d while tatami-host came and went", off)
			}
		}
	}
	d.end(t)
	eventually(t, "the device has left", func() bool { return h.virtioFS("box") == "" })
	h.node(func(n api.NodeService) error {
		_, err := n.Detach(t.Context(), &api.DetachRequest{Sandbox: "box"})
		return err
	})
}

// What the node has can be read while no tatami-host is there, as it was stopped, or
// killed. A lost device is noticed at once.
func TestDeviceWithoutHost(t *testing.T) {
	h := newHost(t, session.Auto, share)
	h.start()
	img := h.push("app", 41)
	h.attach("box", img)
	d := h.device("box")
	node, size := d.lookup(t, img)
	want, errno := d.Queues[0].ReadAll(node, size)
	if errno != 0 {
		t.Fatal(errno)
	}
	img.checkImage(t, want, layers*files)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		h.end(sig)
		if got, errno := d.Queues[0].ReadAll(node, size); errno != 0 || !bytes.Equal(got, want) {
			t.Errorf("without tatami-host after %v: %v, %d bytes or others", sig, errno, len(got))
		}
		h.start()
		eventually(t, "the device is connected again", func() bool { return h.virtioFS("box") == "connected" })
		if got, errno := d.Queues[0].ReadAll(node, size); errno != 0 || !bytes.Equal(got, want) { // with new shares
			t.Errorf("with tatami-host again: %v, %d bytes or others", errno, len(got))
		}
	}
	check(t, unix.Kill(d.cmd.Process.Pid, unix.SIGKILL))
	eventually(t, "the loss is seen", func() bool { return strings.HasPrefix(h.virtioFS("box"), "lost since ") })
	if !strings.Contains(h.log(), "virtio-fs device is lost") {
		t.Error("the loss is not in the log")
	}
	h.node(func(n api.NodeService) error {
		_, err := n.Detach(t.Context(), &api.DetachRequest{Sandbox: "box"})
		return err
	})
}
