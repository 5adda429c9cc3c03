package daemon

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

const block = "[[snapshotter]]\nname = \"block\"\nmode = \"block\"\nupper_size = \"16M\"\n"

// The status on the control socket names snapshotters and modes, and why an
// image is not served lazily.
func TestStatusTellsFallback(t *testing.T) {
	h := newHost(t, session.Auto, share+"fallback = [\"full\"]\n"+block)
	h.start()
	img, s := h.push("app", 7), h.snapshotter("share")
	s.pull(img)
	root := h.container("c1", s, img)
	check(t, mount.UnmountAll(root, 0))
	bad := h.push("bad", 8)
	h.reg.Fault("/bad/blobs/", 0, registrytest.Status(404))
	mounts, err := s.prepareLayer(bad, 0)
	if err != nil || len(mounts) != 1 || mounts[0].Type != "bind" {
		t.Fatalf("a layer to be unpacked: %v, %v", mounts, err)
	}
	check(t, s.Commit(s.ctx(), bad.chain[0].String(), "k8s.io/0/extract-0 "+bad.chain[0].String()))
	st := h.status().Snapshotters
	if len(st) != 2 || st[0].Name != "share" || st[0].Mode != "share" || st[0].LazyLayers != layers ||
		st[0].Socket != filepath.Join(h.run, "share.sock") || st[1].Name != "block" || st[1].Mode != "block" {
		t.Fatalf("status %v", st)
	}
	if c := find(st[0], "c1"); c == nil || c.Kind != "active" || c.Mode != "share" || c.Reason != "" || c.Reference != img.ref || c.ManifestDigest != img.manifest.String() {
		t.Errorf("container %v", c)
	}
	if l := find(st[0], bad.chain[0].String()); l == nil || l.Kind != "committed" || !strings.Contains(l.Reason, "404") {
		t.Errorf("layer that falls back: %v", l)
	}
	if !strings.Contains(h.log(), "a layer is not served lazily; containerd unpacks it") {
		t.Error("the log says nothing of it")
	}
}

func find(s *api.SnapshotterStatus, key string) *api.SnapshotStatus {
	for _, e := range s.Snapshots {
		if e.Key == key {
			return e
		}
	}
	return nil
}

// Two snapshotters use one image; it leaves the disk with the second.
func TestSharedImage(t *testing.T) {
	h := newHost(t, session.Auto, share+block)
	h.start()
	img, a, b := h.push("app", 9), h.snapshotter("share"), h.snapshotter("block")
	a.pull(img)
	h.reg.Reset()
	b.pull(img)
	if n := h.reg.Total().Bytes; n > 64<<10 {
		t.Errorf("the second pull fetched %d bytes", n)
	}
	before := h.disk()
	if before < layers*files*fileSize {
		t.Fatalf("%d bytes on disk of an image of more", before)
	}
	a.removeImage(img)
	if now := h.disk(); now < layers*files*fileSize {
		t.Errorf("%d bytes of %d on disk while one uses it", now, before)
	}
	root := filepath.Join(h.dir, "disk")
	h.check1(b.run("b1", img), img, root)
	b.remove("b1")
	b.removeImage(img)
	if now := h.disk(); now > 1<<20 {
		t.Errorf("%d bytes of %d on disk when nobody uses it", now, before)
	}
	if n := h.stats().Images; n != 0 {
		t.Errorf("%d images", n)
	}
}

func (s *client) removeImage(i image) {
	s.t.Helper()
	for n := range i.chain {
		s.remove(i.chain[len(i.chain)-1-n].String())
	}
}

// disk is how many bytes the node's directory takes.
func (h *host) disk() int64 {
	h.t.Helper()
	var sum int64
	for _, path := range h.tree() {
		var st syscall.Stat_t
		check(h.t, syscall.Lstat(path, &st))
		if st.Mode&syscall.S_IFMT == syscall.S_IFREG && !strings.HasSuffix(path, ".db") {
			sum += st.Blocks * 512
		}
	}
	return sum
}

// A container's disk in mode block is a file that other programs can read, also
// across a dying worker: it has the image's files, and its upper is an ext4.
func TestBlockFile(t *testing.T) {
	bothModes(t, func(t *testing.T, mode session.Mode) {
		h := newHost(t, mode, block)
		h.start()
		img, s := h.push("app", 10), h.snapshotter("block")
		s.pull(img)
		mounts := s.run("b1", img)
		h.check1(mounts, img, filepath.Join(h.dir, "disk"))
		file := mounts[1].Source
		whole := filepath.Join(h.dir, "copy")
		sh(t, "cp", file, whole)
		cmp := exec.CommandContext(t.Context(), "sh", "-c", `for i in 1 2 3 4 5 6; do cat "$1" | cmp - "$2" || exit 1; sync -f "$2"; echo 3 >/proc/sys/vm/drop_caches; done`, "sh", file, whole)
		var said strings.Builder
		cmp.Stderr = &said
		check(t, cmp.Start())
		pid := h.awaitWorker(0)
		for range 3 {
			check(t, syscall.Kill(pid, syscall.SIGKILL))
			pid = h.awaitWorker(pid)
			h.awaitService()
		}
		if err := cmp.Wait(); err != nil {
			t.Errorf("%v: %s", err, said.String())
		}
		s.remove("b1")
		if _, err := os.Lstat(file); err == nil {
			t.Error("the file is there without a container")
		}
		if _, err := s.Mounts(s.ctx(), "b1"); !errdefs.IsNotFound(err) {
			t.Errorf("mounts of no snapshot: %v", err)
		}
	})
}

// check1 looks at the mount list of mode block as a virtual machine would: mounts
// the disk by a loop device and reads it.
func (h *host) check1(mounts []mount.Mount, img image, root string) {
	h.t.Helper()
	if len(mounts) != 3 || mounts[0].Type != "ext4" || mounts[1].Type != "erofs" || mounts[2].Type != "format/mkdir/overlay" {
		h.t.Fatalf("mounts %v", mounts)
	}
	sh(h.t, "dumpe2fs", "-h", mounts[0].Source)
	check(h.t, os.MkdirAll(root, 0o700))
	sh(h.t, "mount", "-t", "erofs", "-o", "ro,loop", mounts[1].Source, root)
	defer sh(h.t, "umount", root)
	img.verifyAll(h.t, root)
}

// sh runs a program.
func sh(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}
