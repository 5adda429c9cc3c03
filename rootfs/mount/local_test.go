package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// mountLocal mounts an image from its file.
func (l *local) mountLocal(img *testImage, id string) Record {
	l.t.Helper()
	rec, err := l.Mount(l.t.Context(), Spec{ID: id, Reference: "test/" + id, Manifest: img.manifest,
		Local: img.path, Source: "file", Target: filepath.Join(l.dir, "target-"+id)})
	check(l.t, err)
	return rec
}

func TestLocalFile(t *testing.T) {
	img := makeImage(t, 1, 100, 4<<20)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		_, err := l.Paths(t.Context()) // asks the session
		check(t, err)
		before := l.Stats()
		a, b := l.mountLocal(img, "a"), l.mountLocal(img, "b")
		if a.Path != p || a.Local != img.path || a.Source != "file" || a.Size != img.size || b.Local != a.Local || b.Source != a.Source {
			t.Errorf("records %+v and %+v", a, b)
		}
		if len(l.lowers) != 1 || !l.Local(img.manifest) {
			t.Errorf("%d lowers, local %v", len(l.lowers), l.Local(img.manifest))
		}
		img.verify(t, a.Target)
		img.verify(t, b.Target)
		if after := l.Stats(); after != before {
			t.Errorf("the session was read: %+v, before %+v", after, before)
		}
		check(t, os.WriteFile(a.Target+"/new", []byte("x"), 0o644))
		check(t, l.SwitchToLocal(t.Context(), img.manifest, img.path)) // it is
		held, err := os.Open(b.Target + "/large")
		check(t, err)
		defer held.Close()
		check(t, l.Unmount(t.Context(), "a"))
		check(t, l.Unmount(t.Context(), "b"))
		check(t, l.Drain(t.Context(), img.manifest)) // nothing to wait for, although it is read
		if files, err := os.ReadDir(filepath.Join(l.dir, "state", imagesDir)); err != nil || len(files) > 0 {
			t.Errorf("image records %v, %v", files, err)
		}
		buf := make([]byte, 1<<20)
		if n, err := held.ReadAt(buf, 1<<20); n != len(buf) {
			t.Errorf("read %d bytes after unmount: %v", n, err)
		}
		assertClean(t, l)
	})
}

// What is mounted one way stays so for those who come later with another.
func TestLocalAndSession(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	bothPaths(t, func(t *testing.T, p Path) {
		l := newLocal(t, Config{Prefer: p})
		f, first := l.mount(img, "a", func(s *Spec) { s.Source = "session" })
		if rec := l.mountLocal(img, "b"); rec.Local != "" || rec.Source != "session" || first.Source != "session" {
			t.Errorf("file after the session: %+v", rec)
		}
		check(t, l.Unmount(t.Context(), "a"))
		check(t, l.Unmount(t.Context(), "b"))
		eventually(t, "image closed", f.closed.Load)
		rec := l.mountLocal(img, "a")
		f, shared := l.mount(img, "b", func(s *Spec) { s.Source = "session" })
		if !f.closed.Load() || shared.Local != img.path || shared.Source != "file" {
			t.Errorf("session after the file: %+v, closed %v", shared, f.closed.Load())
		}
		img.verify(t, rec.Target)
		img.verify(t, shared.Target)
	})
}

func TestLocalFileIsChecked(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	whole, err := os.ReadFile(img.path)
	check(t, err)
	check(t, os.WriteFile(at("empty"), nil, 0o600))
	check(t, os.WriteFile(at("cut"), whole[:len(whole)-1], 0o600))
	check(t, os.WriteFile(at("other"), make([]byte, 8192), 0o600))
	check(t, os.Mkdir(at("dir"), 0o700))
	check(t, os.Symlink(img.path, at("link")))
	check(t, unix.Mkfifo(at("pipe"), 0o600))
	l := newLocal(t, Config{})
	for name, is := range map[string]func(error) bool{
		"none": errdefs.IsNotFound, "empty": errdefs.IsInvalidArgument, "cut": errdefs.IsInvalidArgument, "other": errdefs.IsInvalidArgument,
		"dir": errdefs.IsInvalidArgument, "pipe": errdefs.IsInvalidArgument, "link": func(err error) bool { return errors.Is(err, unix.ELOOP) },
	} {
		t.Run(name, func(t *testing.T) {
			_, err := l.Mount(t.Context(), Spec{ID: "a", Reference: "bad", Manifest: img.manifest, Local: at(name), Target: l.dir + "/t"})
			if err == nil || !is(err) || !strings.Contains(err.Error(), at(name)) {
				t.Errorf("%v", err)
			}
			assertClean(t, l)
		})
	}
	// The magic number is not all: what is no image is refused by the kernel.
	check(t, os.WriteFile(at("broken"), append(whole[:superMagic+4:superMagic+4], make([]byte, 8192-superMagic-4)...), 0o600))
	if _, err := l.Mount(t.Context(), Spec{ID: "a", Reference: "bad", Manifest: img.manifest, Local: at("broken"), Target: l.dir + "/t"}); err == nil {
		t.Error("a broken image is mounted")
	}
	assertClean(t, l)
}

// A filesystem that does not answer must not hang Mount longer than its context,
// and what comes of its late answer goes away by itself.
func TestLocalEndsWithContext(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	bothPaths(t, func(t *testing.T, p Path) {
		for name, blocked := range map[string]int64{"at the check": 1, "at the mount": 2} {
			t.Run(name, func(t *testing.T) {
				far, l := newLocal(t, Config{}), newLocal(t, Config{Prefer: p})
				_, err := l.Paths(t.Context())
				check(t, err)
				f := mustOpen(t, img)
				check(t, far.server.Add(imagefs.Node{ID: 1 << 40, Name: "image", File: f}))
				defer far.server.Remove(1 << 40)
				answer, asked := make(chan struct{}), make(chan struct{})
				var reads atomic.Int64
				before := func(context.Context) {
					if reads.Add(1) == blocked {
						close(asked)
						<-answer
					}
				}
				f.before.Store(&before)
				ctx, cancel := context.WithCancel(t.Context())
				go func() { <-asked; cancel() }()
				counts := census(t)
				_, err = l.Mount(ctx, Spec{ID: "a", Reference: "far", Manifest: img.manifest, Local: far.filePath("image"), Target: l.dir + "/t"})
				if !errors.Is(err, context.Canceled) {
					t.Errorf("mount: %v", err)
				}
				assertClean(t, l)
				close(answer)
				eventually(t, "the thread that waited ends, and all that it made", func() bool { return census(t).fits(counts) })
				assertClean(t, l)
			})
		}
	})
}

// imageWithAttributes has a root directory whose attributes fill several blocks, so
// that they are not read before somebody asks for them.
func imageWithAttributes(t *testing.T) *testImage {
	t.Helper()
	needRoot(t)
	tree := t.TempDir()
	check(t, unix.Mount("tmpfs", tree, "tmpfs", 0, "size=1m"))
	defer func() { check(t, unix.Unmount(tree, 0)) }()
	for n := range 6 {
		check(t, unix.Setxattr(tree, fmt.Sprintf("trusted.a%d", n), bytes.Repeat([]byte{byte(n)}, 2000), 0))
	}
	img := &testImage{path: filepath.Join(t.TempDir(), "image.erofs"), manifest: digest.FromString("attributes")}
	if out, err := exec.Command("mkfs.erofs", "--quiet", img.path, tree).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v: %s", err, out)
	}
	st, err := os.Stat(img.path)
	check(t, err)
	img.size = st.Size()
	return img
}

// So it is when the filesystem ceases to answer when EROFS is mounted already, and
// the overlay is not. The same mount can be made then from elsewhere, also with the
// same upper directory.
func TestOverlayEndsWithContext(t *testing.T) {
	img := imageWithAttributes(t)
	given := t.TempDir()
	check(t, unix.Mount("tmpfs", given, "tmpfs", 0, "size=1m")) // has room for the attributes
	t.Cleanup(func() { check(t, unix.Unmount(given, 0)) })
	bothPaths(t, func(t *testing.T, p Path) {
		for _, upper := range []string{"", filepath.Join(given, string(p))} {
			far, l := newLocal(t, Config{}), newLocal(t, Config{Prefer: p})
			_, err := l.Paths(t.Context())
			check(t, err)
			f := mustOpen(t, img)
			check(t, far.server.Add(imagefs.Node{ID: 1 << 40, Name: "image", File: f}))
			defer far.server.Remove(1 << 40)
			answer := make(chan struct{})
			open := sync.OnceFunc(func() { close(answer) })
			defer open() // before Remove, which waits for reads
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			dir := l.table.lower(img.manifest)
			before := func(context.Context) {
				if mounts, err := readMounts(); err == nil && mounts[dir] != nil {
					cancel()
					<-answer
				}
			}
			f.before.Store(&before)
			counts := census(t)
			spec := Spec{ID: "a", Reference: "far", Manifest: img.manifest, Local: far.filePath("image"), Upper: upper, Target: l.dir + "/t"}
			_, err = l.Mount(ctx, spec)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("mount: %v", err)
			}
			assertClean(t, l)
			spec.Local = img.path
			_, err = l.Mount(t.Context(), spec)
			check(t, err)
			value := make([]byte, 3000)
			if n, err := unix.Getxattr(spec.Target, "trusted.a5", value); n != 2000 || err != nil {
				t.Errorf("an attribute of the root has %d bytes, %v", n, err)
			}
			check(t, l.Unmount(t.Context(), "a"))
			open()
			eventually(t, "the thread that waited ends, and all that it made", func() bool { return census(t).fits(counts) })
			assertClean(t, l)
		}
	})
}

// Nobody who reads a local file notices a worker's death, and the next worker
// knows what the one before has mounted.
func TestKilledWorkerAndLocalFiles(t *testing.T) {
	img := makeImage(t, 2, 100, 1<<20)
	bothModes(t, func(t *testing.T, mode session.Mode) {
		bothPaths(t, func(t *testing.T, p Path) {
			s := supervise(t, mode, workerConfig{Prefer: p, Keep: true})
			mount := func(id string) Record {
				a, err := s.order(order{Op: "mount", Digest: img.manifest, Spec: orderSpec{ID: id, Local: img.path, Target: filepath.Join(s.dir, "target-"+id)}})
				check(t, err)
				return a.Records[0]
			}
			rec := mount("a")
			var r readers
			r.start(img, rec.Target, 4)
			const kills = 3
			for range kills {
				r.progress(t, 100)
				pid := s.kill()
				eventually(t, "another worker answers", func() bool { a, err := s.order(order{Op: "list"}); return err == nil && a.Pid != pid })
			}
			r.finish(t)
			a, err := s.order(order{Op: "list"})
			check(t, err)
			if len(a.Records) != 1 || a.Records[0].State != Mounted || a.Records[0].Local != img.path || a.Stats.Reads > 0 {
				t.Errorf("after %d kills the worker says %+v", kills, a)
			}
			img.verify(t, mount("b").Target)
			for _, id := range []string{"a", "b"} {
				_, err := s.order(order{Op: "unmount", Spec: orderSpec{ID: id}})
				check(t, err)
			}
			for _, dir := range []string{mountsDir, imagesDir, lowerDir} {
				if files, err := os.ReadDir(filepath.Join(s.dir, "state", dir)); err != nil || len(files) > 0 {
					t.Errorf("%s has %v, %v", dir, files, err)
				}
			}
		})
	})
}

// A worker that was cut off while it mounted leaves a record and no lower, or
// one that nobody uses.
func TestRestoreLocalHalfDone(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	l := newLocal(t, Config{})
	lw, err := l.acquire(t.Context(), Spec{ID: "a", Reference: "a", Manifest: img.manifest, Local: img.path})
	check(t, err)
	for _, state := range []State{Mounting, Mounted} {
		rec := lw.rec
		rec.State = state
		check(t, l.table.saveImage(&rec))
		next, err := New(l.cfg)
		check(t, err)
		check(t, next.Restore(t.Context(), func(Record) (File, error) { t.Error("a local file was asked for"); return nil, nil }))
		if len(next.lowers)+len(next.draining) > 0 {
			t.Errorf("%s: %d lowers, %d draining", state, len(next.lowers), len(next.draining))
		}
		assertClean(t, l)
		if state == Mounting { // mount it again for the next round
			delete(l.lowers, img.manifest)
			lw, err = l.acquire(t.Context(), Spec{ID: "a", Reference: "a", Manifest: img.manifest, Local: img.path})
			check(t, err)
		}
	}
}
