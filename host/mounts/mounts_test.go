package mounts

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/host/snapshotter"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// rig is a registry, a node, and mounts on a session in this process.
type rig struct {
	*Mounts
	reg     *registrytest.Server
	node    *node.Node
	session *session.Session
	dir     string
	end     func()
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE and EROFS")
	}
	dir, err := os.MkdirTemp("/tmp", "mounts") //nolint:usetesting // short
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	client := registry.New(registry.Config{RetryMax: -1, RetryWait: time.Millisecond})
	n, err := node.Open(node.Config{Root: filepath.Join(dir, "node"), Registry: client, Profiles: node.Profiles{Record: time.Hour}})
	check(t, err)
	t.Cleanup(func() { check(t, errors.Join(n.Close(), client.Close())) })
	s, err := session.Open(session.Config{Dir: filepath.Join(dir, "state", "fuse")})
	check(t, err)
	t.Cleanup(func() { check(t, s.Close()) })
	g := &rig{reg: registrytest.Start(t, registrytest.Options{}), node: n, session: s, dir: filepath.Join(dir, "state")}
	link, err := s.Attach()
	check(t, err)
	t.Cleanup(func() { check(t, link.Close()) })
	g.start(t, link)
	return g
}

// start is what a worker does.
func (g *rig) start(t *testing.T, link *session.Link) {
	t.Helper()
	mounter, err := mount.New(mount.Config{StateDir: g.dir, Link: link})
	check(t, err)
	g.Mounts, err = New(Config{Node: g.node, Mounter: mounter, Dir: g.dir})
	check(t, err)
	check(t, mounter.Restore(t.Context(), g.Reopen(t.Context())))
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- mounter.Serve(ctx) }()
	end := sync.OnceFunc(func() { cancel(); check(t, <-served) })
	g.end = end
	t.Cleanup(func() {
		defer end()
		if mounter != g.cfg.Mounter {
			return // a later one has its mounts
		}
		uctx, ucancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer ucancel()
		if err := mounter.UnmountAll(uctx); err != nil {
			t.Error(err)
		}
	})
	check(t, g.Collect(t.Context()))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// image pushes and prepares an image of two layers.
func (g *rig) image(t *testing.T, name string) (whole, base snapshotter.Chain) {
	t.Helper()
	lower := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("name", 0o644, "base")))))
	upper := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("name", 0o644, name)))))
	pushed := g.reg.PushImage("library/"+name, "v1", registrytest.Image{Layers: []registrytest.Layer{lower, upper}})
	ref := g.reg.Host() + "/library/" + name + ":v1"
	ids, err := g.Prepare(t.Context(), ref, pushed.Desc.Digest)
	check(t, err)
	if len(ids) != 2 {
		t.Fatalf("diffIDs %v", ids)
	}
	whole = snapshotter.Chain{Reference: ref, Manifest: pushed.Desc.Digest, Layers: 2, Of: 2}
	base = whole
	base.Layers = 1
	return whole, base
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	return string(b)
}

// What the first container on a mount reads becomes the start-up profile of its image.
func TestRecord(t *testing.T) {
	g := newRig(t)
	whole, _ := g.image(t, "app")
	dir, err := g.Mount(t.Context(), "a.1", whole)
	check(t, err)
	if got := content(t, dir+"/name"); got != "app" {
		t.Errorf("read %q", got)
	}
	_, err = g.Mount(t.Context(), "a.2", whole) // records nothing, and is in nobody's way
	check(t, err)
	g.node.EndRecordings(whole.Manifest)
	for deadline := time.Now().Add(10 * time.Second); len(g.node.Profiles()) == 0 && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	l, err := g.node.LeaseNamed(t.Context(), whole.Reference)
	check(t, err)
	defer l.Close()
	paths, err := l.ExportProfile("")
	check(t, err)
	if string(paths) != "/name\n" {
		t.Errorf("recorded %q", paths)
	}
}

// Holders share what is mounted; it goes with the last of them.
func TestHolders(t *testing.T) {
	g := newRig(t)
	whole, base := g.image(t, "app")
	first, err := g.Mount(t.Context(), "a.1", whole)
	check(t, err)
	second, err := g.Mount(t.Context(), "a.2", whole)
	check(t, err)
	lower, err := g.Mount(t.Context(), "a.3", base)
	check(t, err)
	if first != second || content(t, first+"/name") != "app" || content(t, lower+"/name") != "base" {
		t.Errorf("mounted at %s, %s and %s", first, second, lower)
	}
	if again, err := g.Mount(t.Context(), "a.1", whole); err != nil || again != first {
		t.Errorf("held again: %s %v", again, err)
	}
	if _, err := g.Mount(t.Context(), "a.1", base); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a holder of another image: %v", err)
	}
	if all, err := g.Holders(t.Context()); err != nil || !slices.Equal(all, []string{"a.1", "a.2", "a.3"}) {
		t.Errorf("holders %v %v", all, err)
	}
	if err := g.Remove(t.Context(), whole.Manifest); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an image is removed while it is mounted: %v", err)
	}
	for _, h := range []string{"a.1", "a.1", "a.3", "unknown"} {
		check(t, g.Release(t.Context(), h))
	}
	if content(t, second+"/name") != "app" {
		t.Error("the mount of the second holder is gone")
	}
	check(t, g.Release(t.Context(), "a.2"))
	if _, err := os.Stat(first); !os.IsNotExist(err) {
		t.Errorf("the mount point is left: %v", err)
	}
	check(t, g.Remove(t.Context(), whole.Manifest))
}

// The file is the image that is mounted, by another program's reading.
func TestFile(t *testing.T) {
	g := newRig(t)
	whole, base := g.image(t, "app")
	for _, c := range []snapshotter.Chain{whole, base} {
		path, err := g.File(t.Context(), "a.1", c)
		check(t, err)
		if out, err := exec.Command("fsck.erofs", path).CombinedOutput(); err != nil {
			t.Errorf("fsck.erofs: %v: %s", err, out)
		}
		check(t, g.Release(t.Context(), "a.1"))
		if out, err := exec.Command("cat", path).CombinedOutput(); err == nil {
			t.Errorf("the file is still read: %d bytes", len(out))
		}
	}
}

// What a snapshot needs of a tree is read beneath its root, whatever links the
// image has.
func TestLook(t *testing.T) {
	g := newRig(t)
	push := func(name string, entries ...registrytest.Entry) snapshotter.Chain {
		l := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(entries...))))
		c := snapshotter.Chain{Reference: g.reg.Host() + "/" + name + ":v1", Layers: 1, Of: 1}
		c.Manifest = g.reg.PushImage(name, "v1", registrytest.Image{Layers: []registrytest.Layer{l}}).Desc.Digest
		_, err := g.Prepare(t.Context(), c.Reference, c.Manifest)
		check(t, err)
		return c
	}
	for name, c := range map[string]struct {
		entries []registrytest.Entry
		want    map[string]string
	}{
		"files": {[]registrytest.Entry{registrytest.File("etc/passwd", 0o644, "p"), registrytest.File("etc/group", 0o644, "g")}, map[string]string{"etc/passwd": "p", "etc/group": "g"}},
		"links": {[]registrytest.Entry{registrytest.File("usr/p", 0o644, "p"), registrytest.Symlink("etc/passwd", "/usr/p"), registrytest.Symlink("etc/group", "../../../../../../etc/group")}, map[string]string{"etc/passwd": "p"}},
		"none":  {[]registrytest.Entry{registrytest.File("etc", 0o644, "")}, nil},
		"odd":   {[]registrytest.Entry{registrytest.Dir("etc/passwd", 0o755), {Header: tar.Header{Typeflag: tar.TypeFifo, Name: "etc/group", Mode: 0o644}}}, nil},
		// One that no driver has: opening it fails.
		"device": {[]registrytest.Entry{{Header: tar.Header{Typeflag: tar.TypeChar, Name: "etc/passwd", Mode: 0o644, Devmajor: 10, Devminor: 254}}}, nil},
		"large":  {[]registrytest.Entry{registrytest.File("etc/passwd", 0o644, strings.Repeat("x", maxLook+1)), registrytest.File("etc/group", 0o644, "g")}, map[string]string{"etc/group": "g"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := g.Mount(t.Context(), "a."+name, push(name, c.entries...))
			check(t, err)
			tree, err := g.Look(t.Context(), dir, "etc/passwd", "etc/group")
			check(t, err)
			if tree.Mode != os.ModeDir|0o755 || tree.UID != 0 || len(tree.Files) != len(c.want) {
				t.Errorf("%+v, want %v", tree, c.want)
			}
			for file, content := range c.want {
				if string(tree.Files[file]) != content {
					t.Errorf("%s is %q", file, tree.Files[file])
				}
			}
		})
	}
	if _, err := g.Look(t.Context(), filepath.Join(g.dir, "nothing")); !errdefs.IsUnavailable(err) {
		t.Errorf("no tree: %v", err)
	}
}

// What the node has lost is fetched again: containerd still has the image, and
// does not ask for its layers.
func TestLostImage(t *testing.T) {
	g := newRig(t)
	whole, base := g.image(t, "app")
	check(t, g.Remove(t.Context(), whole.Manifest))
	for _, c := range []snapshotter.Chain{whole, base} {
		dir, err := g.Mount(t.Context(), "a.1", c)
		check(t, err)
		if _, err := os.ReadFile(filepath.Join(dir, "name")); err != nil {
			t.Error(err)
		}
		check(t, g.Release(t.Context(), "a.1"))
		check(t, g.Remove(t.Context(), c.Manifest))
	}
}

// The next process goes on with what was held, and takes away what was not.
func TestRestart(t *testing.T) {
	g := newRig(t)
	whole, base := g.image(t, "app")
	dir, err := g.Mount(t.Context(), "a.1", whole)
	check(t, err)
	left, err := g.Mount(t.Context(), "a.2", base)
	check(t, err)
	path, err := g.File(t.Context(), "a.3", whole)
	check(t, err)
	check(t, os.Remove(filepath.Join(g.holdersDir(), "a.2.json"))) // died between record and unmount
	check(t, os.WriteFile(filepath.Join(g.holdersDir(), "a.4.json"), []byte(`{"version":1}`), 0o600))
	g.end()
	link, err := g.session.Attach()
	check(t, err)
	t.Cleanup(func() { check(t, link.Close()) })
	g.start(t, link)
	if content(t, dir+"/name") != "app" {
		t.Error("the mount is gone")
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("what nobody holds is still mounted: %v", err)
	}
	if out, err := exec.Command("fsck.erofs", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v: %s", err, out)
	}
	if all, err := g.Holders(t.Context()); err != nil || !slices.Equal(all, []string{"a.1", "a.3"}) {
		t.Errorf("holders %v %v", all, err)
	}
}

// What could not be unmounted is still a holder's, so that it is released again.
func TestReleaseFails(t *testing.T) {
	g := newRig(t)
	whole, _ := g.image(t, "app")
	dir, err := g.Mount(t.Context(), "a.1", whole)
	check(t, err)
	// In the way of the mount's record.
	obstacle := filepath.Join(g.dir, "mounts", filepath.Base(dir)+".json.tmp")
	check(t, os.Mkdir(obstacle, 0o700))
	if err := g.Release(t.Context(), "a.1"); err == nil {
		t.Error("released")
	}
	if all, err := g.Holders(t.Context()); err != nil || !slices.Equal(all, []string{"a.1"}) {
		t.Errorf("holders %v %v", all, err)
	}
	check(t, os.Remove(obstacle))
	check(t, g.Release(t.Context(), "a.1"))
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("still mounted: %v", err)
	}
	check(t, g.Remove(t.Context(), whole.Manifest))
}

// When the session is gone but not the records, as after a supervisor that was
// killed, holders have what they had once they ask.
func TestSessionLost(t *testing.T) {
	g := newRig(t)
	whole, base := g.image(t, "app")
	dir, err := g.Mount(t.Context(), "a.1", whole)
	check(t, err)
	_, err = g.File(t.Context(), "a.2", base)
	check(t, err)
	g.end()
	check(t, g.session.Close())
	g.session, err = session.Open(session.Config{Dir: filepath.Join(g.dir, "fuse")})
	check(t, err)
	last := g.session
	t.Cleanup(func() { check(t, last.Close()) })
	link, err := g.session.Attach()
	check(t, err)
	t.Cleanup(func() { check(t, link.Close()) })
	g.start(t, link)
	again, err := g.Mount(t.Context(), "a.1", whole)
	check(t, err)
	if again != dir || content(t, dir+"/name") != "app" {
		t.Errorf("mounted at %s, before %s", again, dir)
	}
	path, err := g.File(t.Context(), "a.2", base)
	check(t, err)
	if out, err := exec.Command("fsck.erofs", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v: %s", err, out)
	}
	check(t, g.Release(t.Context(), "a.1"))
	check(t, g.Release(t.Context(), "a.2"))
}

func TestRefuses(t *testing.T) {
	g := newRig(t)
	whole, _ := g.image(t, "app")
	unknown := whole
	unknown.Manifest = digest.FromString("unknown")
	if _, err := g.Mount(t.Context(), "a.1", unknown); !errdefs.IsNotFound(err) {
		t.Errorf("an image that nobody has: %v", err)
	}
	for _, holder := range []string{"", ".", "..", "../x", "a/b", "ä", "a b"} {
		if _, err := g.Mount(t.Context(), holder, whole); !errdefs.IsInvalidArgument(err) {
			t.Errorf("holder %q: %v", holder, err)
		}
	}
	if all, err := g.Holders(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("left over: %v %v", all, err)
	}
}

// Many containers of one image start and end at the same time.
func TestConcurrent(t *testing.T) {
	g := newRig(t)
	whole, _ := g.image(t, "app")
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			holder := "a." + string(rune('A'+i%26)) + string(rune('a'+i/26))
			dir, err := g.Mount(t.Context(), holder, whole)
			if err != nil {
				t.Error(err)
				return
			}
			if b, err := os.ReadFile(dir + "/name"); err != nil || string(b) != "app" {
				t.Errorf("read %q: %v", b, err)
			}
			if err := g.Release(t.Context(), holder); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if left := g.cfg.Mounter.List(); len(left) != 0 {
		t.Errorf("still mounted: %v", left)
	}
}
