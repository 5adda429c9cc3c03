package virtiofsd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// seen is what a guest sees.
type seen map[string]*os.File

func (s seen) add(name string, _ uint64, f *os.File) error { s[name] = f; return nil }
func (s seen) remove(name string) error                    { delete(s, name); return nil }

func open(t *testing.T, dir string) *images {
	t.Helper()
	i, err := openImages(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := i.close(); err != nil {
			t.Error(err)
		}
	})
	must(t, i.showTo(seen{}))
	return i
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// content is what a served file holds; "" for none.
func content(t *testing.T, i *images, name string) string {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	f, guest := i.files[name], i.out.(seen)
	if f == nil && guest[name] == nil {
		return ""
	}
	if f == nil || guest[name] != f.f || len(guest) != len(i.files) {
		t.Fatalf("%s: the guest sees other files", name)
	}
	b := make([]byte, f.Size())
	if _, err := f.ReadAt(context.Background(), b, 0); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestWhatIsServed(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "dir")
	must(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o755))
	write(t, filepath.Join(base, "secret"), "secret")
	write(t, filepath.Join(dir, "image"), "image")
	write(t, filepath.Join(dir, ".hidden"), "hidden")
	write(t, filepath.Join(dir, "sub", "file"), "not shown")
	must(t, os.Symlink("image", filepath.Join(dir, "inside")))
	must(t, os.Symlink("../secret", filepath.Join(dir, "outside")))
	must(t, os.Symlink("..", filepath.Join(dir, "up")))
	must(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o644))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "socket"), Net: "unix"})
	must(t, err)
	defer l.Close()
	i := open(t, dir)
	for _, name := range []string{"inside", "outside", "up", "up/secret", "sub/file", "../secret", "..", ".", "", ".hidden", "sub", "pipe", "socket", "none", "/etc/passwd", filepath.Join(base, "secret")} {
		i.find(name)
		if got := content(t, i, name); got != "" {
			t.Errorf("%s is served: %q", name, got)
		}
	}
	if got := content(t, i, "image"); got != "image" || len(i.files) != 1 {
		t.Errorf("image: %q; %d files", got, len(i.files))
	}
}

func TestFilesComeAndGo(t *testing.T) {
	dir := t.TempDir()
	i := open(t, dir)
	path := filepath.Join(dir, "image")
	write(t, path, "one")
	i.find("image")
	if got := content(t, i, "image"); got != "one" {
		t.Errorf("new: %q", got)
	}
	first := i.files["image"]
	must(t, os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)))
	i.find("image")
	if i.files["image"] != first {
		t.Error("opened twice")
	}
	write(t, path, "larger")
	i.find("image")
	if got := content(t, i, "image"); got != "larger" || i.files["image"] == first {
		t.Errorf("grown: %q", got)
	}
	write(t, path+".new", "other")
	must(t, os.Rename(path+".new", path))
	must(t, i.scan())
	if got := content(t, i, "image"); got != "other" {
		t.Errorf("replaced: %q", got)
	}
	if _, err := first.ReadAt(context.Background(), make([]byte, 1), 0); err == nil {
		t.Error("the old file is still open")
	}
	must(t, os.Remove(path))
	must(t, i.scan())
	if len(i.files) != 0 {
		t.Error("still served after its end")
	}
}

// Somebody changes the directory all the time while a guest looks names up.
func TestRaces(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "dir")
	must(t, os.Mkdir(dir, 0o755))
	write(t, filepath.Join(base, "secret"), "secret")
	watch := watchPipe(t, filepath.Join(base, "pipe"))
	i := open(t, dir)
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() { stopped <- flip(base, dir, stop) }()
	served := 0
	for n := 0; n < 3000; n++ {
		i.find("x")
		switch got := content(t, i, "x"); {
		case strings.Contains(got, "secret"):
			t.Fatal("served a file outside")
		case got == "image":
			served++
		}
	}
	close(stop)
	must(t, <-stopped)
	t.Logf("served %d times", served)
	if n, err := unix.Read(watch, make([]byte, 4096)); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a pipe was opened: %d, %v", n, err)
	}
}

// watchPipe makes a pipe and an inotify that tells of those who open it.
func watchPipe(t *testing.T, path string) int {
	t.Helper()
	must(t, unix.Mkfifo(path, 0o644))
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Close(fd)) })
	_, err = unix.InotifyAddWatch(fd, path, unix.IN_OPEN)
	must(t, err)
	return fd
}

// flip makes dir/x a file, a link to a file outside, a directory, and a pipe, in turns.
func flip(base, dir string, stop <-chan struct{}) error {
	x, tmp := filepath.Join(dir, "x"), filepath.Join(dir, ".tmp")
	for {
		for _, make := range []func() error{
			func() error { return os.WriteFile(tmp, []byte("image"), 0o644) },
			func() error { return os.Symlink("../secret", tmp) },
			func() error { return os.Symlink(filepath.Join(base, "secret"), tmp) },
			func() error { return os.Mkdir(tmp, 0o755) },
			func() error { return os.WriteFile(tmp, []byte("image"), 0o644) },
			func() error { return os.Link(filepath.Join(base, "pipe"), tmp) },
		} {
			select {
			case <-stop:
				return nil
			default:
			}
			if err := make(); err != nil {
				return err
			}
			if err := os.Rename(tmp, x); err != nil { // a directory does not replace a file
				if err := os.Remove(x); err != nil {
					return err
				}
				if err := os.Rename(tmp, x); err != nil {
					return err
				}
			}
		}
	}
}

func TestOpenImagesFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "x")
	for _, path := range []string{file, file + "/none", "/none"} {
		if i, err := openImages(path, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: %v", path, i)
		}
	}
}
