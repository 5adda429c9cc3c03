package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

func TestMountBothPaths(t *testing.T) {
	img := makeImage(t, 1, 300, 8<<20)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		f, rec := l.mount(img, "a")
		if rec.Path != p || rec.State != Mounted {
			t.Fatalf("record %+v, want path %s", rec, p)
		}
		img.verify(t, rec.Target)
		st, err := os.Stat(rec.Target)
		check(t, err)
		if st.Mode().Perm() != 0o751 || st.ModTime().Unix() != 1000000000 {
			t.Errorf("root directory has mode %v and time %v, not those of the image", st.Mode(), st.ModTime())
		}
		check(t, os.WriteFile(rec.Target+"/new", []byte("x"), 0o644))
		check(t, os.Remove(rec.Target+"/d1/f1"))
		check(t, l.Unmount(t.Context(), "a"))
		eventually(t, "image closed", f.closed.Load)
		if _, err := os.Stat(rec.Target); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("target that Mount made is still there: %v", err)
		}
	})
}

func TestReadOnlyAndShared(t *testing.T) {
	img := makeImage(t, 1, 50, 0)
	l := newLocal(t, Config{})
	fa, a := l.mount(img, "a")
	fb, b := l.mount(img, "b", func(s *Spec) { s.ReadOnly = true })
	if !fb.closed.Load() || fa.closed.Load() {
		t.Error("the second mount of an image must use the file of the first")
	}
	img.verify(t, a.Target)
	img.verify(t, b.Target)
	if err := os.WriteFile(b.Target+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only mount: %v", err)
	}
	check(t, l.Unmount(t.Context(), "a"))
	img.verify(t, b.Target)
	if fa.closed.Load() {
		t.Error("image was closed while a mount uses it")
	}
	check(t, l.Unmount(t.Context(), "b"))
	eventually(t, "image closed", fa.closed.Load)
}

func TestGivenUpper(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	l := newLocal(t, Config{})
	// A name that every kind of overlay option string would need escaped.
	upper := filepath.Join(l.dir, `up,per:with\odd "name`)
	use := func(s *Spec) { s.Upper = upper }
	_, rec := l.mount(img, "a", use)
	check(t, os.WriteFile(rec.Target+"/kept", []byte("yes"), 0o600))
	_, err := l.Mount(t.Context(), Spec{ID: "b", Manifest: img.manifest, Image: mustOpen(t, img), Target: l.dir + "/b", Upper: upper})
	if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "mount a of test/a") {
		t.Errorf("second mount with the same upper: %v", err)
	}
	check(t, l.Unmount(t.Context(), "a"))
	_, rec = l.mount(img, "a", use)
	if b, err := os.ReadFile(rec.Target + "/kept"); err != nil || string(b) != "yes" {
		t.Errorf("what was written is gone: %q, %v", b, err)
	}
	// Upper inside an overlay.
	_, err = l.Mount(t.Context(), Spec{ID: "c", Manifest: img.manifest, Image: mustOpen(t, img), Target: l.dir + "/c", Upper: rec.Target + "/upper"})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "itself on an overlay") {
		t.Errorf("overlay on overlay: %v", err)
	}
}

func mustOpen(t *testing.T, img *testImage) *diskFile {
	t.Helper()
	f, err := openDisk(img.path)
	check(t, err)
	return f
}

func TestMountAgain(t *testing.T) {
	img, other := makeImage(t, 1, 10, 0), makeImage(t, 2, 10, 0)
	l := newLocal(t, Config{})
	_, first := l.mount(img, "a")
	f, second := l.mount(img, "a")
	if first.MountID != second.MountID || !f.closed.Load() {
		t.Error("the same Mount again must change nothing and close its image")
	}
	for name, spec := range map[string]Spec{
		"other image":  {ID: "a", Reference: "other", Manifest: other.manifest, Target: first.Target},
		"other target": {ID: "a", Reference: "test/a", Manifest: img.manifest, Target: l.dir + "/elsewhere"},
		"taken target": {ID: "z", Reference: "other", Manifest: other.manifest, Target: first.Target},
	} {
		t.Run(name, func(t *testing.T) {
			f := mustOpen(t, img)
			spec.Image = f
			_, err := l.Mount(t.Context(), spec)
			if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "test/a") || !strings.Contains(err.Error(), spec.ID) {
				t.Errorf("error %v names not both", err)
			}
			if !f.closed.Load() {
				t.Error("image of a failed Mount was not closed")
			}
		})
	}
	if n := len(l.List()); n != 1 {
		t.Errorf("%d records after conflicts", n)
	}
	// The target disappears behind our back; mounting again repairs it.
	check(t, unix.Unmount(first.Target, unix.MNT_DETACH))
	_, third := l.mount(img, "a")
	img.verify(t, third.Target)
}

func TestInvalidSpecs(t *testing.T) {
	l := newLocal(t, Config{})
	good := Spec{ID: "a", Manifest: digest.FromString("x"), Image: tinyImage(), Target: "/tmp/x"}
	for name, change := range map[string]func(*Spec){
		"no ID":          func(s *Spec) { s.ID = "" },
		"slash":          func(s *Spec) { s.ID = "a/b" },
		"dots":           func(s *Spec) { s.ID = ".." },
		"long ID":        func(s *Spec) { s.ID = strings.Repeat("a", maxID+1) },
		"digest":         func(s *Spec) { s.Manifest = "sha256:../../etc" },
		"no image":       func(s *Spec) { s.Image = nil },
		"part of block":  func(s *Spec) { s.Image = memoryFile(make([]byte, 5000)) },
		"relative":       func(s *Spec) { s.Target = "x" },
		"root":           func(s *Spec) { s.Target = "/tmp/.." },
		"relative upper": func(s *Spec) { s.Upper = "x" },
		"upper and ro":   func(s *Spec) { s.Upper, s.ReadOnly = "/tmp/x", true },
		"image and file": func(s *Spec) { s.Local = "/tmp/x" },
		"relative file":  func(s *Spec) { s.Image, s.Local = nil, "x" },
	} {
		t.Run(name, func(t *testing.T) {
			s := good
			change(&s)
			if _, err := l.Mount(t.Context(), s); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v", err)
			}
		})
	}
	if err := l.Unmount(t.Context(), "nobody"); !errdefs.IsNotFound(err) {
		t.Errorf("unmount of nothing: %v", err)
	}
}

func TestFailedMountLeavesNothing(t *testing.T) {
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		garbage := memoryFile(make([]byte, 1<<20))
		_, err := l.Mount(t.Context(), Spec{ID: "a", Reference: "bad", Manifest: digest.FromString("x"), Image: garbage, Target: l.dir + "/t"})
		if err == nil || !strings.Contains(err.Error(), "bad") {
			t.Fatalf("garbage was mounted, or the error names no image: %v", err)
		}
		assertClean(t, l)
		busy := filepath.Join(l.dir, "busy")
		check(t, os.Mkdir(busy, 0o755))
		check(t, unix.Mount("x", busy, "tmpfs", 0, ""))
		defer func() { check(t, unix.Unmount(busy, 0)) }()
		_, err = l.Mount(t.Context(), Spec{ID: "a", Reference: "bad", Manifest: digest.FromString("x"), Image: tinyImage(), Target: busy})
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("mount over a mount point: %v", err)
		}
		assertClean(t, l)
	})
}

// assertClean fails if anything but the session is mounted or recorded.
func assertClean(t *testing.T, l *local) {
	t.Helper()
	mounts, err := readMounts()
	check(t, err)
	for at := range mounts {
		if strings.HasPrefix(at, l.dir) && at != l.session.Dir() && at != filepath.Join(l.dir, "busy") {
			t.Errorf("%s is still mounted", at)
		}
	}
	for _, dir := range []string{mountsDir, lowerDir, upperDir} {
		files, err := os.ReadDir(filepath.Join(l.dir, "state", dir))
		check(t, err)
		if len(files) > 0 {
			t.Errorf("%s has %v", dir, files)
		}
	}
	eventually(t, "no image record is left", func() bool {
		files, _ := os.ReadDir(filepath.Join(l.dir, "state", imagesDir))
		return len(files) == 0
	})
}

// A source that hangs must not hang Mount longer than its context.
func TestMountEndsWithContext(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		_, err := l.Paths(t.Context())
		check(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		f := mustOpen(t, img)
		hang := func(ctx context.Context) { cancel(); <-ctx.Done() }
		f.before.Store(&hang)
		_, err = l.Mount(ctx, Spec{ID: "a", Manifest: img.manifest, Image: f, Target: l.dir + "/t"})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		assertClean(t, l)
	})
}

func TestFailedReadIsEIOAndNotSticky(t *testing.T) {
	img := makeImage(t, 1, 20, 1<<20)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		f, rec := l.mount(img, "a")
		img.verify(t, rec.Target)
		dropCaches(t)
		boom := fmt.Errorf("registry is away: %w", errdefs.ErrUnavailable)
		f.fail.Store(&boom)
		if err := img.verifyFile(rec.Target, "large"); !errors.Is(err, syscall.EIO) {
			t.Errorf("read of a failing image: %v", err)
		}
		if l.Stats().Failures == 0 {
			t.Error("failures are not counted")
		}
		f.fail.Store(nil)
		img.verify(t, rec.Target)
	})
}

// A reader that waits for data or metadata can be killed.
func TestWaitingReaderIsKillable(t *testing.T) {
	img := makeImage(t, 1, 500, 1<<20)
	bothPaths(t, func(t *testing.T, p Path) {
		for name, command := range map[string]func(target string) *exec.Cmd{
			"data":     func(target string) *exec.Cmd { return exec.Command("cat", target+"/large") },
			"metadata": func(target string) *exec.Cmd { return exec.Command("ls", "-lR", target) },
		} {
			t.Run(name, func(t *testing.T) {
				l := newLocal(t, Config{Prefer: p})
				f, rec := l.mount(img, "a")
				dropCaches(t)
				waiting, killed := make(chan struct{}), make(chan struct{})
				var once sync.Once
				hang := func(ctx context.Context) {
					once.Do(func() { close(waiting) })
					select {
					case <-ctx.Done():
					case <-killed:
					}
				}
				f.before.Store(&hang)
				cmd := command(rec.Target)
				check(t, cmd.Start())
				<-waiting
				check(t, cmd.Process.Kill())
				_ = cmd.Wait() // returns: that is the test
				close(killed)
			})
		}
	})
}

// Processes that have files open when their mount goes read on.
func TestUnmountInUse(t *testing.T) {
	img := makeImage(t, 1, 10, 4<<20)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		file, rec := l.mount(img, "a")
		h, err := os.Open(rec.Target + "/large")
		check(t, err)
		check(t, l.Unmount(t.Context(), "a"))
		if file.closed.Load() {
			t.Fatal("image closed although a file of it is open")
		}
		buf := make([]byte, 4<<20)
		n, err := h.ReadAt(buf, 0)
		if n != len(buf) {
			t.Errorf("read %d bytes after unmount: %v", n, err)
		}
		check(t, h.Close())
		eventually(t, "image closed", file.closed.Load)
		assertClean(t, l)
	})
}

// slowFile takes a while to close.
type slowFile struct{ *diskFile }

func (f slowFile) Close() error {
	time.Sleep(100 * time.Millisecond)
	return f.diskFile.Close()
}

// Drain waits until images are closed: only then can they be removed.
func TestDrainWaitsForClose(t *testing.T) {
	l := newLocal(t, Config{})
	img := makeImage(t, 1, 1, 0)
	f, _ := l.mount(img, "a", func(s *Spec) { s.Image = slowFile{s.Image.(*diskFile)} })
	check(t, l.Unmount(t.Context(), "a"))
	check(t, l.Drain(t.Context(), img.manifest))
	if !f.closed.Load() {
		t.Error("the image is still open")
	}
}

func TestSweep(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	l := newLocal(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.WatchMounts(ctx) }()
	f, rec := l.mount(img, "a")
	_, keep := l.mount(img, "b")
	check(t, unix.Unmount(rec.Target, 0))
	eventually(t, "the unmounted one is released", func() bool { return len(l.List()) == 1 })
	img.verify(t, keep.Target)
	check(t, unix.Unmount(keep.Target, 0))
	// Somebody else's mount at our target is not ours to undo.
	check(t, os.MkdirAll(keep.Target, 0o755))
	check(t, unix.Mount("x", keep.Target, "tmpfs", 0, ""))
	eventually(t, "image closed", f.closed.Load)
	cancel()
	check(t, <-done)
	check(t, unix.Unmount(keep.Target, 0))
	if n, err := l.Sweep(t.Context()); n != 0 || err != nil {
		t.Errorf("sweep of nothing: %d, %v", n, err)
	}
	assertClean(t, l)
}

// What is mounted is cached once: data in EROFS alone.
func TestDataIsCachedOnce(t *testing.T) {
	img := makeImage(t, 1, 10, 32<<20)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		check(t, l.server.Add(imagefs.Node{ID: 1 << 40, Name: "image", File: mustOpen(t, img)}))
		defer l.server.Remove(1 << 40)
		dir := filepath.Join(l.dir, "mnt")
		check(t, os.Mkdir(dir, 0o755))
		check(t, thread.Isolated(func() error {
			_, fd, err := newLowerMount(t.Context(), p, l.filePath("image"), img.size)
			if err != nil {
				return err
			}
			return place(fd, dir)
		}))
		defer func() { check(t, unix.Unmount(dir, 0)) }()
		var inFile, inErofs uint64
		for range 20 { // others may drop caches, or need the memory
			if b, err := os.ReadFile(dir + "/large"); err != nil || len(b) != 32<<20 {
				t.Fatalf("read %d bytes: %v", len(b), err)
			}
			inFile, inErofs = cachedPages(t, l.filePath("image")), cachedPages(t, dir+"/large")
			if inFile > 100 || inErofs == 32<<20/4096 {
				break
			}
		}
		t.Logf("pages cached: %d of the image file, %d of the file read", inFile, inErofs)
		if inErofs < 8000 || inFile > 100 {
			t.Error("data is cached in the image file too, or not at all")
		}
	})
}

func cachedPages(t *testing.T, path string) uint64 {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) // os.Open would poll a FUSE file
	check(t, err)
	defer func() { _ = unix.Close(fd) }()
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &st, 0); err != nil {
		t.Skipf("needs cachestat(2), Linux 6.5: %v", err)
	}
	return st.Cache
}

func TestManyMountsLeakNothing(t *testing.T) {
	a, b := makeImage(t, 1, 20, 0), makeImage(t, 2, 20, 0)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		l.mount(a, "warm")
		check(t, l.Unmount(t.Context(), "warm"))
		before := census(t)
		for i := range 50 {
			_, ra := l.mount(a, "a")
			_, rb := l.mount(b, "b")
			if i%10 == 0 {
				a.verify(t, ra.Target)
				b.verify(t, rb.Target)
			}
			check(t, l.Unmount(t.Context(), "a"))
			check(t, l.Unmount(t.Context(), "b"))
		}
		assertClean(t, l)
		eventually(t, fmt.Sprintf("counts go back to %v, are %v", before, census(t)), func() bool { return census(t).fits(before) })
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.lowers)+len(l.draining)+len(l.mounts) > 0 {
			t.Errorf("left: %d lowers, %d draining, %d mounts", len(l.lowers), len(l.draining), len(l.mounts))
		}
	})
}
