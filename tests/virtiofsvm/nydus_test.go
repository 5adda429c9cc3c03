package virtiofsvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/vmtest"
)

// Where Kata's guests have what is shared (kata_guest_nydus_root_dir in the file
// share_fs/mod.rs of runtime-rs, kataGuestNydusRootDir in kata_agent.go).
const (
	sharedRoot  = "/run/kata-containers/shared"
	mountShared = "mkdir -p " + sharedRoot + " && mount -t virtiofs -o nodev kataShared " + sharedRoot
)

// nydusd is a tatami-virtiofsd in the place of nydusd, with a client that does what
// nydus_client.rs of runtime-rs does.
type nydusd struct {
	*daemon
	t      *testing.T
	socket string
	api    string
	client http.Client
}

// startNydusd starts the program as nydus_daemon.rs does, and waits as it does.
func startNydusd(t *testing.T, dir string, extra ...string) *nydusd {
	t.Helper()
	n := &nydusd{t: t, socket: filepath.Join(dir, "virtiofsd.sock"), api: filepath.Join(dir, "nydusd-api.sock")}
	n.client = http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.api)
		}}}
	n.daemon = launch(t, nil, append([]string{"virtiofs", "--hybrid-mode", "--log-level", "info", "--apisock", n.api, "--sock", n.socket}, extra...)...)
	for range 100 {
		if n.running() {
			return n
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("the API does not answer: %s", &n.err)
	return nil
}

func (n *nydusd) running() bool {
	resp, err := n.client.Get("http://unix/api/v1/daemon")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	var info struct{ State string }
	return resp.StatusCode == http.StatusOK && json.NewDecoder(resp.Body).Decode(&info) == nil && info.State == "RUNNING"
}

// do sends a request and returns what is wrong, which may be nothing.
func (n *nydusd) do(method, mountpoint string, body io.Reader) error {
	n.t.Helper()
	req, err := http.NewRequest(method, "http://unix/api/v1/mount?mountpoint="+url.QueryEscape(mountpoint), body)
	if err != nil {
		n.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := n.client.Do(req)
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNoContent {
		return nil
	}
	var f struct{ Code, Message string }
	if err := json.NewDecoder(resp.Body).Decode(&f); err != nil {
		n.t.Fatalf("%s: %v", resp.Status, err)
	}
	return errors.New(f.Code + ": " + f.Message)
}

func (n *nydusd) mount(mountpoint, kind, source, config string) error {
	n.t.Helper()
	body, err := json.Marshal(map[string]string{"fs_type": kind, "source": source, "config": config})
	if err != nil {
		n.t.Fatal(err)
	}
	return n.do(http.MethodPost, mountpoint, bytes.NewReader(body))
}

func (n *nydusd) unmount(mountpoint string) {
	n.t.Helper()
	if err := n.do(http.MethodDelete, mountpoint, nil); err != nil {
		n.t.Error(err)
	}
}

// node is the directories of a node: images that are mounted, what Kata shares, and
// what a snapshotter has.
type node struct {
	*fixture
	t     *testing.T
	base  string
	image string // where the fixture's image is mounted
	rw    string // Kata's shared directory
}

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts images and shares them")
	}
	f := newFixture(t)
	n := &node{fixture: f, t: t, base: filepath.Dir(f.dir)}
	n.image, n.rw = filepath.Join(n.base, "mounted"), filepath.Join(n.base, "rw")
	for _, dir := range []string{n.image, n.rw} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	makeShared(t, n.rw)
	run(t, "", "mount", "-t", "erofs", "-o", "ro,loop", filepath.Join(f.dir, "image"), n.image)
	n.unmountLater(n.image)
	return n
}

func (n *node) unmountLater(dir string) { unmountLater(n.t, dir) }

func unmountLater(t *testing.T, dir string) {
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// makeShared makes a directory what it is where systemd runs, which Kata counts on: what
// is mounted in it is seen elsewhere, too.
func makeShared(t *testing.T, dir string) {
	t.Helper()
	if err := errors.Join(syscall.Mount(dir, dir, "", syscall.MS_BIND, ""), syscall.Mount("", dir, "", syscall.MS_SHARED, "")); err != nil {
		t.Fatal(err)
	}
	unmountLater(t, dir)
}

// prepare makes a container's directories as our snapshotter and create_standalone_rootfs
// of nydus_rootfs.rs do. It returns the snapshot's directory.
func (n *node) prepare(cid string) string {
	n.t.Helper()
	snapshot, share := filepath.Join(n.base, "snapshot-"+cid), filepath.Join(n.rw, cid)
	for _, dir := range []string{snapshot + "/fs", snapshot + "/work", share + "/rootfs", share + "/snapshotdir"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			n.t.Fatal(err)
		}
	}
	at := filepath.Join(share, "snapshotdir")
	if err := errors.Join(syscall.Mount(snapshot, at, "", syscall.MS_BIND, ""), syscall.Mount("", at, "", syscall.MS_SLAVE, "")); err != nil {
		n.t.Fatal(err)
	}
	n.unmountLater(at)
	return snapshot
}

// overlay is what kata-agent mounts for a container (options of both runtimes).
func overlay(cid string) string {
	c := sharedRoot + "/containers/" + cid
	return fmt.Sprintf("mount -t overlay -o upperdir=%[1]s/snapshotdir/fs,workdir=%[1]s/snapshotdir/work,lowerdir=%[2]s/rafs/%[3]s/lowerdir,index=off overlay %[1]s/rootfs",
		c, sharedRoot, cid)
}

func bootShared(t *testing.T, n *nydusd) *guest {
	t.Helper()
	g := start(t, vmtest.Options{CPUs: 2, Args: append(device("kataShared", n.socket, 2), "-m", "slots=2,maxmem=2G")})
	go func() {
		<-n.done
		select {
		case <-g.Done():
		case <-time.After(10 * time.Second): // a guest that lost its device hangs
			_ = g.Kill() // the test sees it
		}
	}()
	return g
}

// TestNydus is a sandbox of Kata with shared_fs "virtio-fs-nydus": one container that
// is there when the machine starts, one that comes later.
func TestNydus(t *testing.T) {
	host := newNode(t)
	n := startNydusd(t, host.base, "--passthrough")
	if err := n.mount("/containers", "passthrough_fs", host.rw, ""); err != nil {
		t.Fatal(err)
	}
	snapshot := host.prepare("c1")
	if err := n.mount("/rafs/c1/lowerdir", "rafs", host.image, "{}"); err != nil {
		t.Fatal(err)
	}
	g := bootShared(t, n)
	g.sh(mountShared)
	g.during(t, "image", func(t *testing.T, g *guest) {
		same(t, "image", g.sh("cd "+sharedRoot+"/rafs/c1/lowerdir && "+describe), host.want)
		for _, s := range []string{"echo x > new", "echo x >> blob", "mkdir d", "rm blob", "mv blob x", "chmod 777 blob", "ln -s a b", "touch blob"} {
			if got := g.try("cd " + sharedRoot + "/rafs/c1/lowerdir && " + s + " 2>&1 || true"); !strings.Contains(got, "Read-only file system") {
				t.Errorf("%s: %q", s, got)
			}
		}
	})
	g.during(t, "container", func(t *testing.T, g *guest) { testContainer(t, host, g, "c1", snapshot) })
	g.during(t, "later container", func(t *testing.T, g *guest) {
		snapshot := host.prepare("c2")
		if err := n.mount("/rafs/c2/lowerdir", "rafs", host.image, "{}"); err != nil {
			t.Fatal(err)
		}
		testContainer(t, host, g, "c2", snapshot)
	})
	g.during(t, "container ends", func(t *testing.T, g *guest) {
		g.sh("umount " + sharedRoot + "/containers/c1/rootfs")
		n.unmount("/rafs/c1/lowerdir")
		g.sh("i=0; while ls " + sharedRoot + "/rafs/c1/lowerdir/blob >/dev/null 2>&1; do i=$((i+1)); [ $i -lt 200 ] || exit 1; sleep 0.05; done")
		g.sh("sha256sum < " + sharedRoot + "/containers/c2/rootfs/blob")
	})
	g.powerOff()
	n.ended(t)
	for _, socket := range []string{n.socket, n.api} {
		if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", socket, err)
		}
	}
}

// testContainer mounts a container's root as kata-agent does, and changes it.
func testContainer(t *testing.T, host *node, g *guest, cid, snapshot string) {
	root := sharedRoot + "/containers/" + cid + "/rootfs"
	g.sh(overlay(cid))
	look := "cd " + root + " && " + describe
	same(t, "container", g.sh(look), host.want)
	changes := []string{
		"echo new > new", "echo more >> d1/f8", "rm d2/f2", "chmod 600 d1/f29", "chown 5:6 d1/f15", "ln -s /nowhere lost",
		"mv d1/f22 renamed", "chown -h 7:8 link", "rm -r d5", "mkdir d5", "echo n > d5/n", "mkfifo newpipe", "mkdir -m 1777 d6/tmp",
	}
	g.sh("cd " + root + " && " + strings.Join(changes, " && "))
	// The same changes of the same tree by this machine's kernel.
	want := filepath.Join(t.TempDir(), "tree")
	run(t, "", "cp", "-a", host.image, want)
	run(t, want, "busybox", "sh", "-c", strings.Join(changes, " && "))
	changed := run(t, want, "busybox", "sh", "-c", describe)
	same(t, "container after its changes", g.sh(look), changed)
	// And again, out of what the overlay keeps in the snapshot.
	g.sh("umount " + root + " && " + overlay(cid))
	same(t, "container after a new mount", g.sh(look), changed)
	same(t, "image on the node", run(t, host.image, "busybox", "sh", "-c", describe), host.want)
	if got, err := os.ReadFile(filepath.Join(snapshot, "fs/new")); err != nil || string(got) != "new\n" {
		t.Errorf("in the snapshot: %q, %v", got, err)
	}
}

// same compares two descriptions, and shows the lines that one of them lacks.
func same(t *testing.T, what, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	lacks := func(text, other string) (out string) {
		for line := range strings.Lines(text) {
			if !strings.Contains("\n"+other, "\n"+line) {
				out += "\t" + line
			}
		}
		return out
	}
	t.Errorf("%s: has\n%s, lacks\n%s", what, lacks(got, want), lacks(want, got))
}

// Without the option, a node's directory is not shared, and the answer says what to
// do; images are shown all the same.
func TestNydusWithoutPassthrough(t *testing.T) {
	host := newNode(t)
	n := startNydusd(t, host.base)
	if err := n.mount("/containers", "passthrough_fs", host.rw, ""); err == nil || !strings.Contains(err.Error(), `virtio_fs_extra_args = ["--passthrough"]`) {
		t.Error(err)
	}
	if err := n.mount("/rafs/c1/lowerdir", "rafs", filepath.Join(host.dir, "image"), "{}"); err == nil || !strings.Contains(err.Error(), "mode nydus") {
		t.Errorf("the source is a file: %v", err)
	}
	if err := n.mount("/rafs/c1/lowerdir", "rafs", host.image, "{}"); err != nil {
		t.Fatal(err)
	}
	g := bootShared(t, n)
	g.sh(mountShared)
	if got := g.sh("ls -A " + sharedRoot); got != "rafs\n" {
		t.Errorf("%q", got)
	}
	same(t, "image", g.sh("cd "+sharedRoot+"/rafs/c1/lowerdir && "+describe), host.want)
	g.powerOff()
	n.ended(t)
}
