package torture

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// MountOverlay mounts layer directories, lowest first, read-only at target.
func MountOverlay(target string, layers []string) error {
	// overlayfs wants two lower directories, or an upper one.
	empty := target + "-empty"
	if err := os.MkdirAll(empty, 0o755); err != nil {
		return err
	}
	return mountOverlay(target, append([]string{empty}, layers...), "", unix.MS_RDONLY)
}

func mountUpper(target string, layers []string, upper, work string) error {
	return mountOverlay(target, layers, ",upperdir="+upper+",workdir="+work, 0)
}

func mountOverlay(target string, layers []string, more string, flags uintptr) error {
	lower := slices.Clone(layers)
	slices.Reverse(lower)
	options := "index=off,redirect_dir=off,metacopy=off,lowerdir=" + strings.Join(lower, ":") + more
	if err := unix.Mount("overlay", target, "overlay", flags, options); err != nil {
		return fmt.Errorf("mount overlay at %s: %w", target, err)
	}
	return nil
}

// Root skips a test that is not run by root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts, device nodes, owners")
	}
}

// TempFS mounts a tmpfs for the time of the test: it holds every attribute and
// every time, and is fast.
func TempFS(t testing.TB) string {
	t.Helper()
	Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatalf("mount tmpfs: %v", err)
	}
	Unmount(t, dir)
	return dir
}

// Unmount unmounts target when the test is over.
func Unmount(t testing.TB, target string) {
	t.Helper()
	t.Cleanup(func() {
		if err := unix.Unmount(target, 0); err != nil {
			t.Errorf("unmount %s: %v", target, err)
			_ = unix.Unmount(target, unix.MNT_DETACH) // the test has failed; leave less behind
		}
	})
}

// MountImage mounts an image file read-only in dir for the time of the test:
// as a file that EROFS reads by itself, which must not be on a tmpfs, or
// through a loop device.
func MountImage(t testing.TB, file, dir string, loop bool) string {
	t.Helper()
	target := filepath.Join(dir, fmt.Sprintf("image-loop-%t", loop))
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if loop {
		if out, err := exec.CommandContext(t.Context(), "mount", "-t", "erofs", "-o", "ro,loop", file, target).CombinedOutput(); err != nil {
			t.Fatalf("mount through a loop device: %v\n%s", err, out)
		}
	} else if err := unix.Mount(file, target, "erofs", unix.MS_RDONLY, ""); err != nil {
		t.Fatalf("mount file as EROFS (Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE): %v", err)
	}
	Unmount(t, target)
	return target
}

// WriteImage writes the complete image to a file; segments has their bytes.
func WriteImage(file string, img *index.Image, segments map[index.ID][]byte) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if _, err = f.Write(img.Bootstrap); err == nil {
		for _, s := range img.Segments {
			if int64(len(segments[s.ID])) != s.Table.Size {
				err = fmt.Errorf("segment %s has %d bytes of %d", s.ID, len(segments[s.ID]), s.Table.Size)
				break
			}
			if _, err = f.WriteAt(segments[s.ID], s.Off); err != nil {
				break
			}
		}
	}
	if err2 := f.Close(); err == nil {
		err = err2
	}
	return err
}
