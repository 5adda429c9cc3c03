package e2e

import (
	"encoding/gob"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// TestTree compares what a container sees of an image with everything that
// makes merging hard, under this kernel and under the virtual machine's, with
// the kernel's own overlay of the unpacked layers.
func TestTree(t *testing.T) {
	need(t, places[1].needs...)
	dump, err := os.ReadFile(filepath.Join(bin, "treedump"))
	if err != nil {
		t.Fatal(err)
	}
	tool := torture.NewTar()
	tool.File("treedump", string(dump), torture.Mode(0o755))
	tars := append(torture.Layers(), tool.Bytes())
	want := overlaid(t, tars)
	for _, p := range places {
		for _, path := range []string{"file", "loop"} {
			if p.vm == "qemu" && path == "file" {
				continue // Linux 6.1 mounts EROFS from block devices only
			}
			t.Run(p.name+"/"+path, func(t *testing.T) {
				need(t, p.needs...)
				r := newRig(t)
				var layers []registrytest.Layer
				for _, tar := range tars {
					layers = append(layers, registrytest.Must(registrytest.Gzip(tar)))
				}
				r.reg.PushImage("torture", "v1", registrytest.Image{Layers: layers})
				res := r.must(job{vm: p.vm, source: p.source, flags: []string{"--mount-path", path}, image: r.ref("torture:v1"),
					command: append([]string{"/treedump", "/"}, mountPoints[1:]...)})
				var got treecmp.Tree
				if err := gob.NewDecoder(strings.NewReader(res.stdout)).Decode(&got); err != nil {
					t.Fatalf("%v; %s", err, res.stderr)
				}
				delete(got, ".")
				// Overlayfs counts names that upper layers hide as links, too.
				for _, d := range treecmp.Diff(got, want, treecmp.Nlink) {
					t.Error(d)
				}
			})
		}
	}
}

// mountPoints are what the runtime puts into the container, and the root
// directory, whose time changes when it makes them.
var mountPoints = []string{".", "proc", "sys", "dev"}

// overlaid is the tree that the kernel shows over the unpacked layers.
func overlaid(t *testing.T, tars [][]byte) treecmp.Tree {
	t.Helper()
	dirs, err := torture.Unpack(torture.TempFS(t), tars)
	if err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	if err := torture.MountOverlay(target, dirs); err != nil {
		t.Fatal(err)
	}
	torture.Unmount(t, target)
	want, err := treecmp.Snapshot(target, mountPoints[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	delete(want, ".")
	return want
}
