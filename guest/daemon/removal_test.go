package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// A container is removed as kata-agent does it: unmount its root file system,
// remove that directory and the bundle, tell nobody (kata-containers:
// src/agent/src/storage/mod.rs, StorageDeviceGeneric::cleanup).
func removeContainer(t *testing.T, root string) {
	t.Helper()
	if err := unix.Unmount(root, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(root); err != nil && !os.IsNotExist(err) { // we may have been faster
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(root)); err != nil {
		t.Fatal(err)
	}
}

// mountFull mounts an image unpacked, at a bundle's root file system.
func (g *guest) mountFull(id string) string {
	g.t.Helper()
	root := filepath.Join(g.path(id), "rootfs")
	if _, err := g.Mount(g.t.Context(), &api.MountRequest{Id: id, Target: root, Mode: api.Mode_MODE_FULL}); err != nil {
		g.t.Fatal(err)
	}
	return root
}

// held lists what containers hold in the state directory: files, directories
// and mounts.
func (g *guest) held() []string {
	g.t.Helper()
	var found []string
	for _, dir := range []string{"mounts", "images", "lower", "upper", "configs", "layers", "unpacked/images", "unpacked/mounts"} {
		entries, err := os.ReadDir(filepath.Join(g.path("state"), dir))
		if err != nil && !os.IsNotExist(err) {
			g.t.Fatal(err)
		}
		for _, e := range entries {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		target := strings.Fields(line)[4]
		// The session and the tmpfs of unpacked images are there for the next ones.
		if strings.HasPrefix(target, g.dir) && target != g.path("state/fuse") && target != g.path("state/unpacked") {
			found = append(found, target)
		}
	}
	return found
}

// awaitFree waits until containers hold nothing.
func (g *guest) awaitFree() {
	g.t.Helper()
	var held []string
	for range 500 {
		list, err := g.List(g.t.Context(), &api.ListRequest{})
		if err != nil {
			g.t.Fatal(err)
		}
		if held = g.held(); len(held) == 0 && len(list.Mounts) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	g.t.Errorf("still held: %q", held)
}

func TestRemovedContainersHoldNothing(t *testing.T) {
	for _, path := range []string{"file", "loop"} {
		t.Run(path, func(t *testing.T) {
			n := newNode(t)
			img := n.pushSample("sample")
			for _, id := range []string{"lazy1", "lazy2", "full"} {
				n.add(id, sampleRef, img, "host")
			}
			g := startGuest(t, n, "--mount-path", path)
			roots := []string{g.mustPull("lazy1", sampleRef), g.mustPull("lazy2", sampleRef), g.mountFull("full")}
			for _, root := range roots {
				if err := os.WriteFile(filepath.Join(root, "written"), make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if len(g.held()) < 6 {
				t.Fatalf("the test looks at the wrong places: %q", g.held())
			}
			removeContainer(t, roots[0])
			// The image serves its other container.
			if got, err := readAll(filepath.Join(roots[1], samplePath(7))); err != nil || got != sampleContent(7) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			removeContainer(t, roots[1])
			removeContainer(t, roots[2])
			g.awaitFree()
		})
	}
}

// TestRemovedWithoutAWorker removes a container while nobody watches, and no
// later change of mounts tells of it.
func TestRemovedWithoutAWorker(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	for name, mount := range map[string]func(*guest) string{
		"lazy": func(g *guest) string { return g.mustPull("c1", sampleRef) },
		"full": func(g *guest) string { return g.mountFull("c1") },
	} {
		t.Run(name, func(t *testing.T) {
			g := startGuest(t, n)
			root := mount(g)
			if err := unix.Kill(g.workerPID(), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			removeContainer(t, root)
			g.connect()
			g.awaitFree()
		})
	}
}

// TestPullAgainAfterTheAgentUnmounted asks for a container again at once after
// its mount was undone by somebody else: the record alone is no answer, and
// what is cleaned up late must not be the new mount.
func TestPullAgainAfterTheAgentUnmounted(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	g := startGuest(t, n)
	for name, mount := range map[string]func() string{
		"lazy": func() string { return g.mustPull("c1", sampleRef) },
		"full": func() string { return g.mountFull("c1") },
	} {
		t.Run(name, func(t *testing.T) {
			for range 5 {
				root := mount()
				if _, err := os.Stat(filepath.Join(root, samplePath(0))); err != nil {
					t.Fatal(err)
				}
				if err := unix.Unmount(root, 0); err != nil {
					t.Fatal(err)
				}
			}
			g.awaitFree()
		})
	}
}
