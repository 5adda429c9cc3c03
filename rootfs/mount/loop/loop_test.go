package loop

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func needLoop(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: attaches loop devices")
	}
	if _, err := os.Stat(controlPath); err != nil {
		t.Skipf("needs loop devices: %v", err)
	}
}

func backing(t *testing.T, content byte, size int) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, bytes.Repeat([]byte{content}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func attach(t *testing.T, f *os.File, size int64) *Device {
	t.Helper()
	d, err := Attach(t.Context(), int(f.Fd()), size)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestAttachSwitchRelease(t *testing.T) {
	needLoop(t)
	const size = 1 << 20
	first, second := backing(t, 1, size), backing(t, 2, size)
	d := attach(t, first, size)
	if !d.Direct {
		t.Error("no direct I/O")
	}
	read := func() byte {
		t.Helper()
		b := make([]byte, 4096)
		if err := unix.Fadvise(d.fd, 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Pread(d.fd, b, 8192); err != nil {
			t.Fatal(err)
		}
		return b[17]
	}
	if got := read(); got != 1 {
		t.Errorf("read %d from the first file", got)
	}
	if err := SetReadAhead(d.Path, 256<<10); err != nil {
		t.Error(err)
	}
	if got := backingName(t, d.Path); got != first.Name() {
		t.Errorf("backing file %q", got)
	}
	if err := Switch(d.Path, int(backing(t, 3, size/2).Fd())); err == nil {
		t.Error("switched to a smaller file")
	}
	if err := Switch(d.Path, int(second.Fd())); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != 2 {
		t.Errorf("read %d from the second file", got)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got := backingName(t, d.Path); got == second.Name() {
		t.Errorf("device still has %q after the last user left", got)
	}
}

// backingName is the file behind a device as the kernel names it, "" for none.
func backingName(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "loop/backing_file"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.TrimSuffix(string(b), "\n")
}

// Many at once: each gets a device of its own, whoever else takes free ones.
func TestAttachMany(t *testing.T) {
	needLoop(t)
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			f := backing(t, byte(i), 1<<16)
			for range 10 {
				d, err := Attach(t.Context(), int(f.Fd()), 1<<16)
				if err != nil {
					t.Error(err)
					return
				}
				b := make([]byte, 4096)
				if _, err := unix.Pread(d.fd, b, 0); err != nil || b[0] != byte(i) {
					t.Errorf("read %d (%v) from the device of file %d", b[0], err, i)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestMissingNode(t *testing.T) {
	needLoop(t)
	d := attach(t, backing(t, 1, 4096), 4096)
	defer func() { _ = d.Close() }()
	node := filepath.Join(t.TempDir(), filepath.Base(d.Path))
	fd, err := openDevice(node, d.Number)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	var a, b unix.Stat_t
	if err := unix.Stat(node, &a); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(d.Path, &b); err != nil {
		t.Fatal(err)
	}
	if a.Rdev != b.Rdev || a.Mode&unix.S_IFMT != unix.S_IFBLK {
		t.Errorf("made device %#x mode %o, want %#x", a.Rdev, a.Mode, b.Rdev)
	}
}

func TestOddSizes(t *testing.T) {
	needLoop(t)
	for _, size := range []int64{-512, 0, 1000} {
		if _, err := Attach(t.Context(), 0, size); !errdefs.IsInvalidArgument(err) {
			t.Errorf("size %d: %v", size, err)
		}
	}
	d := attach(t, backing(t, 1, 5*512), 5*512) // not whole 4 KiB blocks
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
