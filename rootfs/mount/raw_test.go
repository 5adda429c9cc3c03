package mount

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// An exposed image is its bytes, may be opened many times beside a mount of the
// same image, and its pages are cached: who comes second reads nothing.
func TestExpose(t *testing.T) {
	img := makeImage(t, 5, 20, 1<<20)
	l := newLocal(t, Config{})
	_, rec := l.mount(img, "a")
	f, err := openDisk(img.path)
	check(t, err)
	path, err := l.Expose(t.Context(), img.manifest, "test/raw", f)
	check(t, err)
	again, err := openDisk(img.path)
	check(t, err)
	if same, err := l.Expose(t.Context(), img.manifest, "test/raw", again); err != nil || same != path || !again.closed.Load() {
		t.Errorf("exposed again: %s %v, closed %v; want %s", same, err, again.closed.Load(), path)
	}
	sameBytes(t, path, img.path)
	if n := f.reads.Swap(0); n == 0 {
		t.Error("nothing was read from the image")
	}
	sameBytes(t, path, img.path)
	if n := f.reads.Load(); n != 0 {
		t.Errorf("pages are not cached: %d reads", n)
	}
	// Not os.Open: its epoll_ctl would ask the session while it blocks it.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	check(t, err)
	held := os.NewFile(uintptr(fd), path)
	defer held.Close()
	check(t, l.Conceal(t.Context(), img.manifest))
	if !f.closed.Load() {
		t.Error("the image is not closed")
	}
	check(t, unix.Fadvise(int(held.Fd()), 0, 0, unix.FADV_DONTNEED))
	if _, err := io.ReadAll(held); err == nil {
		t.Error("a concealed image is read through a descriptor from before")
	}
	if _, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		t.Error("a concealed image is opened again")
	}
	if err := l.Conceal(t.Context(), img.manifest); !errdefs.IsNotFound(err) {
		t.Errorf("concealed twice: %v", err)
	}
	img.verify(t, rec.Target)
}

// sameBytes compares two files in another process.
func sameBytes(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("cmp", a, b).CombinedOutput(); err != nil {
		t.Fatalf("cmp: %v: %s", err, out)
	}
}

// The next worker serves what the one before exposed.
func TestExposedIsRestored(t *testing.T) {
	img := makeImage(t, 6, 20, 1<<20)
	l := newLocal(t, Config{})
	f, err := openDisk(img.path)
	check(t, err)
	path, err := l.Expose(t.Context(), img.manifest, "test/raw", f)
	check(t, err)
	next, err := New(l.cfg)
	check(t, err)
	var asked Record
	check(t, next.Restore(t.Context(), func(r Record) (File, error) { asked = r; return openDisk(img.path) }))
	if asked.Manifest != img.manifest || asked.Reference != "test/raw" {
		t.Errorf("asked for %+v", asked)
	}
	if all := next.Exposed(); len(all) != 1 || all[0] != img.manifest {
		t.Errorf("exposed %v", all)
	}
	same, err := next.Expose(t.Context(), img.manifest, "test/raw", f)
	if err != nil || filepath.Base(same) != filepath.Base(path) {
		t.Errorf("restored as %s (%v), was %s", same, err, path)
	}
}
