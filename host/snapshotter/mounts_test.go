package snapshotter

import (
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/mount/manager"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/volume"
)

const ref = "docker.io/library/app:1"

// What each mode returns for a container, and for a view, of an image of two
// layers. Read by, all of kata-containers 7c6ba40c54ea and containerd v2.4.2:
//
//   - guest: Go create.go:354 (checkAndMount), fs_share_linux.go:552
//     (handleVirtualVolume), runtime-rs rootfs/mod.rs:201 (is_guest_pull_volume),
//     rootfs/virtual_volume.rs; containerd core/mount/mount_linux.go:550
//     (mountWithHelper).
//   - block: runtime-rs rootfs/erofs_rootfs.rs:941 (is_erofs_multi_layer) and
//     :455 (new); containerd core/mount/manager for templates and mkdir.
//   - nydus: Go create.go:363, fs_share_linux.go:496 (shareRootFilesystemWithNydus),
//     nydusd.go:489 (parseExtraOption), runtime-rs rootfs/nydus_rootfs.rs:197
//     (create_standalone_rootfs), kata-types mount.rs:161 (NydusExtraOptions);
//     containerd as for guest.
//   - share, full: Go create.go:375 (doMount), runtime-rs
//     rootfs/share_fs_rootfs.rs:26; containerd core/mount/mount_linux.go:100.
var lists = []struct {
	mode         Mode
	change       func(*Config)
	active, view string
}{
	{Guest, nil,
		`fuse./opt/tatami/bin/nydus-overlayfs-tatami overlay
	workdir=$ROOT/snapshots/3/work
	upperdir=$ROOT/snapshots/3/fs
	lowerdir=$ROOT/snapshots/3/lower
	index=off
	$VOLUME
`,
		`fuse./opt/tatami/bin/nydus-overlayfs-tatami overlay
	ro
	lowerdir=$ROOT/snapshots/4/fs:$ROOT/snapshots/4/lower
	index=off
	$VOLUME
`},
	{Block, func(c *Config) { c.UpperSize = 64 << 20 },
		`ext4 $ROOT/snapshots/3/rwlayer.img
	rw
	loop
erofs $IMAGES/merged/$MANIFEST-2.erofs
	ro
	loop
format/mkdir/overlay overlay
	X-containerd.mkdir.path={{ mount 0 }}/upper:0755
	X-containerd.mkdir.path={{ mount 0 }}/work:0755
	workdir={{ mount 0 }}/work
	upperdir={{ mount 0 }}/upper
	lowerdir={{ mount 1 }}
	index=off
`,
		`erofs $IMAGES/merged/$MANIFEST-2.erofs
	ro
	loop
format/mkdir/overlay overlay
	ro
	lowerdir=$ROOT/snapshots/4/fs:{{ mount 0 }}
	index=off
`},
	{Block, func(c *Config) { c.UpperSize = 0 },
		`erofs $IMAGES/merged/$MANIFEST-2.erofs
	ro
	loop
format/mkdir/overlay overlay
	workdir=$ROOT/snapshots/3/work
	upperdir=$ROOT/snapshots/3/fs
	lowerdir={{ mount 0 }}
	index=off
`,
		`erofs $IMAGES/merged/$MANIFEST-2.erofs
	ro
	loop
format/mkdir/overlay overlay
	ro
	lowerdir=$ROOT/snapshots/4/fs:{{ mount 0 }}
	index=off
`},
	{Share, nil,
		`overlay overlay
	workdir=$ROOT/snapshots/3/work
	upperdir=$ROOT/snapshots/3/fs
	lowerdir=$ROOT/snapshots/3/\lower
	index=off
`,
		`bind $IMAGES/merged/$MANIFEST-2
	ro
	rbind
`},
	{Nydus, nil,
		`fuse.nydus-overlayfs overlay
	workdir=$ROOT/snapshots/3/work
	upperdir=$ROOT/snapshots/3/fs
	lowerdir=$ROOT/snapshots/3/lower
	index=off
	extraoption={"source":"$IMAGES/merged/$MANIFEST-2","config":"{}","snapshotdir":"$ROOT/snapshots/3/guest","fs_version":"v6"}
`,
		`bind $IMAGES/merged/$MANIFEST-2
	ro
	rbind
`},
	{Full, nil,
		`overlay overlay
	workdir=$ROOT/snapshots/3/work
	upperdir=$ROOT/snapshots/3/fs
	lowerdir=$ROOT/snapshots/2/fs:$ROOT/snapshots/1/fs
	index=off
`,
		`overlay overlay
	lowerdir=$ROOT/snapshots/2/fs:$ROOT/snapshots/1/fs
	index=off
`},
}

func TestMountLists(t *testing.T) {
	needRoot(t)
	for _, l := range lists {
		t.Run(string(l.mode), func(t *testing.T) {
			g := newRig(t, l.mode, func(c *Config) {
				if l.change != nil {
					l.change(c)
				}
			})
			p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}, tree{"b": "2"}))
			show := func(mounts []mount.Mount) string {
				record := must(volume.NewGuestPull(ref).Option())(t)
				return strings.NewReplacer(record, "$VOLUME", p.manifest.Encoded(), "$MANIFEST").Replace(g.text(plain(t, mounts)))
			}
			active := must(g.Prepare(t.Context(), "k8s.io/7/c1", p.top()))(t)
			if got := show(active); got != l.active {
				t.Errorf("active:\n%swant\n%s", got, l.active)
			}
			view := must(g.View(t.Context(), "k8s.io/8/v1", p.top()))(t)
			if got := show(view); got != l.view {
				t.Errorf("view:\n%swant\n%s", got, l.view)
			}
			g.restart(t)
			if got := show(must(g.Mounts(t.Context(), "k8s.io/7/c1"))(t)); got != l.active {
				t.Errorf("active after a restart:\n%swant\n%s", got, l.active)
			}
			if got := show(must(g.Mounts(t.Context(), "k8s.io/8/v1"))(t)); got != l.view {
				t.Errorf("view after a restart:\n%swant\n%s", got, l.view)
			}
		})
	}
}

// plain shows a record for Kata's virtio-fs-nydus as the text that it is.
func plain(t *testing.T, mounts []mount.Mount) []mount.Mount {
	t.Helper()
	for _, m := range mounts {
		for i, o := range m.Options {
			if encoded, ok := strings.CutPrefix(o, "extraoption="); ok {
				m.Options[i] = "extraoption=" + string(must(base64.StdEncoding.DecodeString(encoded))(t))
			}
		}
	}
	return mounts
}

// A container without an image gets an empty directory in every mode.
func TestScratch(t *testing.T) {
	for _, mode := range modes {
		g := newRig(t, mode, func(c *Config) { c.UpperSize = 0 })
		mounts := must(g.Prepare(t.Context(), "c", ""))(t)
		if got, want := g.text(mounts), "bind $ROOT/snapshots/1/fs\n\trw\n\trbind\n"; got != want {
			t.Errorf("%s: %s", mode, got)
		}
	}
}

// mounted is a list really mounted with containerd's code, for reading and
// writing.
func mounted(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func checkFiles(t *testing.T, root string, want tree) {
	t.Helper()
	for name, content := range want {
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != content {
			t.Errorf("%s: %q, %v; want %q", name, got, err, content)
		}
	}
}

func TestReallyMounted(t *testing.T) {
	needRoot(t)
	for _, mode := range []Mode{Share, Full} {
		t.Run(string(mode), func(t *testing.T) {
			g := newRig(t, mode)
			p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1", "d/x": "lower"}, tree{"b": "2", "d/x": "upper"}))
			want := tree{"a": "1", "b": "2", "d/x": "upper"}
			root := mounted(t, must(g.Prepare(t.Context(), "c1", p.top()))(t))
			checkFiles(t, root, want)
			if err := os.WriteFile(filepath.Join(root, "new"), []byte("n"), 0o600); err != nil {
				t.Fatal(err)
			}
			checkFiles(t, g.path("3", upperDir), tree{"new": "n"})
			view := mounted(t, must(g.View(t.Context(), "v1", p.top()))(t))
			checkFiles(t, view, want)
			if err := os.WriteFile(filepath.Join(view, "new"), nil, 0o600); err == nil {
				t.Error("a view can be written")
			}
			// containerd looks users up in such a mount of the container's list.
			if err := mount.WithReadonlyTempMount(t.Context(), must(g.Mounts(t.Context(), "c1"))(t), func(ro string) error {
				checkFiles(t, ro, want)
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

// makeErofs makes an EROFS image with files.
func makeErofs(t *testing.T, image string, files tree) {
	t.Helper()
	src := t.TempDir()
	if err := writeTree(src, files); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mkfs.erofs", image, src).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// needTools skips tests of a machine without the programs.
func needTools(t *testing.T, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("needs %s (e2fsprogs and erofs-utils)", n)
		}
	}
}

// What Kata's Go runtime asks of a single overlay mount before it mounts it:
// whether statfs finds EROFS at one of the lowerdirs (kata_agent.go:2994,
// IsErofsRootFS). If it does, the container fails for want of a layer.erofs.
func TestGoRuntimeMountsShare(t *testing.T) {
	needRoot(t)
	needTools(t, "mkfs.erofs")
	g := newRig(t, Share)
	files := tree{"etc/passwd": "root"}
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", files))
	mounts := must(g.Prepare(t.Context(), "c1", p.top()))(t)
	// As with the node, the image is a real EROFS.
	image := filepath.Join(t.TempDir(), "image")
	makeErofs(t, image, files)
	lower := filepath.Join(g.images.root, "merged", p.manifest.Encoded()+"-1")
	if err := mount.All([]mount.Mount{{Type: "erofs", Source: image, Options: []string{"ro", "loop"}}}, lower); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(lower, 0); err != nil {
			t.Error(err)
		}
	})
	var seen unix.Statfs_t
	if err := unix.Statfs(g.path("2", lowerLink), &seen); err != nil || seen.Type != unix.EROFS_SUPER_MAGIC_V1 {
		t.Fatalf("the test's image is not on EROFS: %+v, %v", seen, err)
	}
	for _, o := range mounts[0].Options {
		lowers, ok := strings.CutPrefix(o, "lowerdir=")
		for _, l := range strings.Split(lowers, ":") {
			var st unix.Statfs_t
			if ok && unix.Statfs(l, &st) == nil && st.Type == unix.EROFS_SUPER_MAGIC_V1 {
				t.Errorf("the Go runtime takes %q for a disk", l)
			}
			// containerd 2.4 looks users up there: FSMounts of its internal/fsview.
			if users, err := os.ReadFile(filepath.Join(l, "etc/passwd")); ok && string(users) != "root" {
				t.Errorf("containerd finds users %q at %q: %v", users, l, err)
			}
		}
	}
	checkFiles(t, mounted(t, mounts), files)
}

// containerd's mount manager mounts the lists of block mode, when it looks users
// up or a runtime does not take disks.
func TestBlockByMountManager(t *testing.T) {
	needRoot(t)
	needTools(t, "mkfs.erofs", "mkfs.ext4")
	for _, size := range []int64{0, 64 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			g := newRig(t, Block, func(c *Config) { c.UpperSize = size })
			p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"etc/passwd": "root"}))
			lists := map[string][]mount.Mount{
				"active": must(g.Prepare(t.Context(), "c1", p.top()))(t),
				"view":   must(g.View(t.Context(), "v1", p.top()))(t),
			}
			makeErofs(t, filepath.Join(g.images.root, "merged", p.manifest.Encoded()+"-1.erofs"), tree{"etc/passwd": "root"})
			for what, list := range lists {
				t.Run(what, func(t *testing.T) { checkFiles(t, activated(t, list), tree{"etc/passwd": "root"}) })
			}
		})
	}
}

// activated mounts a list by containerd's mount manager.
func activated(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	dir := t.TempDir()
	targets := filepath.Join(dir, "targets")
	if err := os.Mkdir(targets, 0o700); err != nil {
		t.Fatal(err)
	}
	db := must(bolt.Open(filepath.Join(dir, "mounts.db"), 0o600, nil))(t)
	t.Cleanup(func() { db.Close() })
	manager := must(manager.NewManager(db, targets, manager.WithAllowedRoot(dir)))(t)
	ctx := namespaces.WithNamespace(t.Context(), "test")
	info := must(manager.Activate(ctx, "one", mounts))(t)
	t.Cleanup(func() {
		if err := manager.Deactivate(namespaces.WithNamespace(t.Context(), "test"), "one"); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mount.All(info.System, root); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(root, 0); err != nil {
			t.Error(err)
		}
	})
	return root
}

// 128 layers on an image of the node: the options exceed a page, and containerd
// shortens them by the directory that all lowers are in.
func TestDeepMixed(t *testing.T) {
	needRoot(t)
	g := newRig(t, Share)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"base": "b"}))
	parent, want := p.top(), tree{"base": "b"}
	for i := range 127 {
		key, name := fmt.Sprint("k", i), fmt.Sprint("n", i)
		mounts := must(g.Prepare(t.Context(), key, parent))(t)
		file := fmt.Sprint("f", i)
		if i == 0 || i == 126 {
			if err := unpack(t.Context(), mounts, tree{file: "x"}); err != nil {
				t.Fatal(err)
			}
		} else if err := writeTree(g.upperOf(t, mounts), tree{file: "x"}); err != nil {
			t.Fatal(err)
		}
		if err := g.Commit(t.Context(), name, key); err != nil {
			t.Fatal(err)
		}
		parent, want[file] = name, "x"
	}
	mounts := must(g.Prepare(t.Context(), "c", parent))(t)
	if n := len(strings.Join(mounts[0].Options, ",")); n < os.Getpagesize() {
		t.Errorf("options of %d bytes prove nothing", n)
	}
	checkFiles(t, mounted(t, mounts), want)
	checkFiles(t, mounted(t, must(g.View(t.Context(), "v", parent))(t)), want)
}

// upperOf is the upper directory in a list.
func (g *rig) upperOf(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	t.Fatalf("no upperdir: %+v", mounts)
	return ""
}

// The root of a container is as the image has it.
func TestRootAttributes(t *testing.T) {
	needRoot(t)
	for _, mode := range []Mode{Share, Full} {
		g := newRig(t, mode)
		p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
		root := filepath.Join(g.images.root, "merged", p.manifest.Encoded()+"-1")
		if mode == Full {
			root = g.path("1", upperDir)
		}
		if err := os.MkdirAll(root, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(root, 7, 8); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(root, 0o751); err != nil {
			t.Fatal(err)
		}
		check := func(key string, uid, gid uint32, labels map[string]string) {
			t.Helper()
			mounts := must(g.Prepare(t.Context(), key, p.top(), snapshots.WithLabels(labels)))(t)
			var st unix.Stat_t
			if err := unix.Stat(g.upperOf(t, mounts), &st); err != nil || st.Uid != uid || st.Gid != gid || st.Mode&0o777 != 0o751 {
				t.Errorf("%s: owner %d:%d, mode %o, %v", mode, st.Uid, st.Gid, st.Mode, err)
			}
		}
		check("c1", 7, 8, nil)
		check("c2", 100000, 200000, map[string]string{
			snapshots.LabelSnapshotUIDMapping: "1:5:1,0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:200000:65536"})
		for _, bad := range []string{"", "x", "0:1", "1:1:1", "0:99999999999:1", "0:0:0", "0:-1:1"} {
			_, err := g.Prepare(t.Context(), "bad", p.top(), snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotUIDMapping: bad}))
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("mapping %q: %v", bad, err)
			}
		}
	}
}
