package bootstrap_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// overlay shows the layers through the kernel's overlayfs.
func overlay(t testing.TB, tars [][]byte, dir string) treecmp.Tree {
	t.Helper()
	dirs, err := torture.Unpack(dir, tars)
	if err != nil {
		t.Fatal(err)
	}
	merged := filepath.Join(dir, "merged")
	if err := os.Mkdir(merged, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := torture.MountOverlay(merged, dirs); err != nil {
		t.Fatal(err)
	}
	torture.Unmount(t, merged)
	return snapshot(t, merged)
}

// The image shows what overlayfs shows. Link counts are left out: overlayfs
// gives those of the layer's directory, which count hidden names.
func TestOverlay(t *testing.T) {
	for name, tars := range map[string][][]byte{
		"layers":    torture.Layers(),
		"one layer": torture.Layers()[:1],
		"divergent": torture.Divergent(),
		"large":     {torture.Large(20_001), torture.Large(10)},
	} {
		t.Run(name, func(t *testing.T) {
			dir := torture.TempFS(t)
			want := overlay(t, tars, dir)
			file, _ := imageFile(t, tars, t.TempDir())
			fsck(t, file)
			for _, loop := range []bool{false, true} {
				if loop && name == "large" {
					continue // takes its time, and "layers" has it all
				}
				got := snapshot(t, torture.MountImage(t, file, dir, loop))
				t.Logf("%d names", len(got))
				report(t, "overlayfs, image", treecmp.Diff(want, got, treecmp.Nlink))
				linkCounts(t, got)
			}
		})
	}
}

func fsck(t testing.TB, file string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "fsck.erofs", file).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

// linkCounts checks link counts against the names in the tree.
func linkCounts(t *testing.T, tree treecmp.Tree) {
	t.Helper()
	want := map[string]uint64{}
	for path, n := range tree {
		if n.Mode&0o170000 == 0o040000 {
			want[path] += 2
			if path != "." {
				want[filepath.Dir(path)]++
			}
		} else if n.Group != "" {
			want[n.Group]++
		} else {
			want[path]++
		}
	}
	for path, n := range tree {
		if n.Group != "" {
			path = n.Group
		}
		if n.Nlink != want[path] {
			t.Errorf("%q: %d links, want %d", path, n.Nlink, want[path])
		}
	}
}
