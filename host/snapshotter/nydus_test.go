package snapshotter

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// nydusHelper puts our mount helper where mount.fuse looks for the one of
// "fuse.nydus-overlayfs": in PATH.
func nydusHelper(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("mount.fuse"); err != nil {
		t.Skip("needs mount.fuse (fuse3)")
	}
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "nydus-overlayfs"), "../cmd/nydus-overlayfs-tatami")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// containerd mounts what both of Kata's runtimes take and do not mount.
func TestNydusMountedByContainerd(t *testing.T) {
	needRoot(t)
	nydusHelper(t)
	g := newRig(t, Nydus)
	files := tree{"etc/passwd": "root", "b": "2"}
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", files))
	mounts := must(g.Prepare(t.Context(), "c1", p.top()))(t)
	root := mounted(t, mounts)
	checkFiles(t, root, files)
	if err := os.WriteFile(filepath.Join(root, "host"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := list(t, g.path("2", guestDir, upperDir)); len(got) != 0 {
		t.Errorf("the VM's upper has %q", got)
	}
	if err := mount.WithReadonlyTempMount(t.Context(), must(g.Mounts(t.Context(), "c1"))(t), func(ro string) error {
		checkFiles(t, ro, files)
		if err := os.WriteFile(filepath.Join(ro, "new"), nil, 0o600); err == nil {
			t.Error("a read-only mount can be written")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// Whatever a VM makes of its directory, the host follows no name in it.
func TestNydusHostileGuest(t *testing.T) {
	needRoot(t)
	nydusHelper(t)
	g := newRig(t, Nydus)
	files := tree{"a": "1"}
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", files))
	must(g.Prepare(t.Context(), "c1", p.top()))(t)
	secret := t.TempDir()
	if err := writeTree(secret, tree{"secret": strings.Repeat("s", 1<<20)}); err != nil {
		t.Fatal(err)
	}
	guest := g.path("2", guestDir)
	for _, name := range []string{upperDir, workDir, lowerLink} {
		if err := os.RemoveAll(filepath.Join(guest, name)); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(secret, filepath.Join(guest, name)); err != nil {
			t.Fatal(err)
		}
	}
	g.restart(t)
	root := mounted(t, must(g.Mounts(t.Context(), "c1"))(t))
	checkFiles(t, root, files)
	if _, err := os.Stat(filepath.Join(root, "secret")); !os.IsNotExist(err) {
		t.Error("the host's directory is in the container")
	}
	if u := must(g.Usage(t.Context(), "c1"))(t); u.Size >= 1<<20 {
		t.Errorf("usage %+v", u)
	}
	if err := g.Commit(t.Context(), "n", "c1"); !errdefs.IsNotImplemented(err) {
		t.Errorf("commit: %v", err)
	}
	if err := mount.UnmountAll(root, 0); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(t.Context(), "c1"); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(secret, "secret")); err != nil || st.Size() != 1<<20 {
		t.Errorf("the host's file: %v, %v", st, err)
	}
}

// The root that the VM sees has the attributes that the image's has, also where the
// host makes no use of it, and what is written there counts.
func TestNydusGuestDirectory(t *testing.T) {
	needRoot(t)
	g := newRig(t, Nydus)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	root := filepath.Join(g.images.root, "merged", p.manifest.Encoded()+"-1")
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(root, 7, 8); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root, 0o751); err != nil {
		t.Fatal(err)
	}
	must(g.Prepare(t.Context(), "c1", p.top()))(t)
	var st unix.Stat_t
	if err := unix.Stat(g.path("2", guestDir, upperDir), &st); err != nil || st.Uid != 7 || st.Gid != 8 || st.Mode&0o777 != 0o751 {
		t.Errorf("owner %d:%d, mode %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	before := must(g.Usage(t.Context(), "c1"))(t)
	if err := writeTree(g.path("2", guestDir, upperDir), tree{"f": strings.Repeat("f", 1<<20)}); err != nil {
		t.Fatal(err)
	}
	if after := must(g.Usage(t.Context(), "c1"))(t); after.Size < before.Size+1<<20 {
		t.Errorf("usage %+v, before %+v", after, before)
	}
}

// A node that cannot mount images has nothing to show to the VM; the next mode is
// tried, and the reason kept.
func TestNydusFallback(t *testing.T) {
	needRoot(t)
	g := newRig(t, Nydus, func(c *Config) { c.Fallback = []Mode{Block} })
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	g.images.mountErr = errdefs.ErrNotImplemented
	mounts := must(g.Prepare(t.Context(), "c1", p.top()))(t)
	if e := g.entry(t, "c1"); e.Mode != Block || !strings.HasPrefix(e.Reason, "nydus: ") || mounts[0].Type != "erofs" {
		t.Errorf("%+v, %+v", e, mounts)
	}
}
