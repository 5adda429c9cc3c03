package posix

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

var readOnly = flag.String("readonly", "", "a tree of Prepare on a read-only file system")

// TestReadOnly looks at the prepared tree.
func TestReadOnly(t *testing.T) {
	dir := *readOnly
	if dir == "" {
		dir = mountEROFS(t)
	}
	t.Run("ReadDirConsistency", func(t *testing.T) { posixtest.ReadDirConsistency(t, filepath.Join(dir, "many")) })
	for name, test := range reading {
		t.Run(name, func(t *testing.T) { test(t, dir) })
	}
	t.Run("refusals", func(t *testing.T) { testRefusals(t, dir) })
}

// mountEROFS has the tree on a loop device of this machine.
func mountEROFS(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("needs mkfs.erofs: install erofs-utils")
	}
	tree, image, dir := t.TempDir(), filepath.Join(t.TempDir(), "image"), t.TempDir()
	if err := Prepare(tree); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.erofs", "--quiet", image, tree}, {"mount", "-t", "erofs", "-o", "ro,loop", image, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}
