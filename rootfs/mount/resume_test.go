package mount

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

func bothModes(t *testing.T, f func(t *testing.T, mode session.Mode)) {
	for _, m := range []session.Mode{session.Direct, session.Journal} {
		t.Run(string(m), func(t *testing.T) { f(t, m) })
	}
}

// readers verify files of a tree at random until told to stop.
type readers struct {
	stop     atomic.Bool
	ops      atomic.Int64
	failures atomic.Int64
	first    atomic.Pointer[error]
	wg       sync.WaitGroup
}

func (r *readers) start(img *testImage, root string, n int) {
	names := img.names()
	for range n {
		r.wg.Go(func() {
			for !r.stop.Load() {
				if err := img.verifyFile(root, names[rand.IntN(len(names))]); err != nil {
					r.failures.Add(1)
					r.first.CompareAndSwap(nil, &err)
				}
				r.ops.Add(1)
			}
		})
	}
}

func (r *readers) finish(t *testing.T) {
	t.Helper()
	r.stop.Store(true)
	r.wg.Wait()
	if n := r.failures.Load(); n > 0 {
		t.Errorf("%d of %d reads failed, the first: %v", n, r.ops.Load(), *r.first.Load())
	}
}

// progress waits until n more files were read.
func (r *readers) progress(t *testing.T, n int64) {
	t.Helper()
	from := r.ops.Load()
	eventually(t, "readers go on", func() bool { return r.ops.Load() >= from+n })
}

func TestKilledWorkerIsAPause(t *testing.T) {
	img := makeImage(t, 2, 200, 4<<20)
	bothModes(t, func(t *testing.T, mode session.Mode) {
		bothPaths(t, func(t *testing.T, p Path) {
			s := supervise(t, mode, workerConfig{Prefer: p, Delay: time.Millisecond})
			rec := s.mount(img, "a")
			if rec.Path != p {
				t.Fatalf("mounted by %s", rec.Path)
			}
			var r readers
			r.start(img, rec.Target, 6)
			const kills = 5
			for range kills {
				r.progress(t, 200)
				s.kill()
			}
			r.progress(t, 200)
			r.finish(t)
			img.verify(t, rec.Target)
			a, err := s.order(order{Op: "list"})
			check(t, err)
			if len(a.Records) != 1 || a.Records[0].State != Mounted || a.Restarts < kills {
				t.Errorf("after %d kills the worker says %+v", kills, a)
			}
			t.Logf("%d files verified, %d restarts", r.ops.Load(), s.restarts.Load())
			check(t, s.stop())
			if _, err := os.Stat(filepath.Join(s.dir, "target-a")); err == nil {
				t.Error("target is still there after the end")
			}
		})
	})
}

// A worker that is killed inside mount(2), which waits for that same worker,
// cannot be reaped before the next one has answered.
func TestKilledWhileMounting(t *testing.T) {
	img := makeImage(t, 1, 50, 0)
	bothModes(t, func(t *testing.T, mode session.Mode) {
		bothPaths(t, func(t *testing.T, p Path) {
			stick := filepath.Join(t.TempDir(), "stick")
			check(t, os.WriteFile(stick, nil, 0o600))
			s := supervise(t, mode, workerConfig{Prefer: p, Stick: stick})
			o := order{Op: "mount", Digest: img.manifest, Spec: orderSpec{ID: "a", Image: img.path, Target: filepath.Join(s.dir, "target-a")}}
			mounted := make(chan error, 1)
			go func() {
				_, err := s.order(o) // asked again when the worker dies
				mounted <- err
			}()
			eventually(t, "the mount waits for the image", func() bool { _, err := os.Stat(stick + ".hit"); return err == nil })
			s.kill()
			eventually(t, "another worker answers", func() bool { a, err := s.order(order{Op: "stats"}); return err == nil && a.Restarts > 0 })
			check(t, os.Remove(stick))
			check(t, <-mounted)
			img.verify(t, o.Spec.Target)
			a, err := s.order(order{Op: "list"})
			check(t, err)
			if len(a.Records) != 1 || a.Records[0].State != Mounted {
				t.Errorf("records %+v", a.Records)
			}
			images, err := loadAll[imageRecord](filepath.Join(s.dir, "state", imagesDir))
			check(t, err)
			if len(images) != 1 {
				t.Errorf("image records %+v", images)
			}
		})
	})
}

// After the switch nothing comes to the session, which may end.
func TestSwitchToLocal(t *testing.T) {
	img := makeImage(t, 2, 200, 4<<20)
	bothModes(t, func(t *testing.T, mode session.Mode) {
		keepMounts := func(c *session.SuperviseConfig) { c.Cleanup = nil }
		s := supervise(t, mode, workerConfig{Prefer: LoopPath, Keep: true}, keepMounts)
		rec := s.mount(img, "a")
		other := s.mount(makeImage(t, 3, 10, 0), "other")
		var r readers
		r.start(img, rec.Target, 4)
		r.progress(t, 100)
		sw := order{Op: "switch", Digest: img.manifest, Path: img.path}
		_, err := s.order(order{Op: "switch", Digest: img.manifest, Path: os.Args[0]})
		if err == nil {
			t.Error("switched to a file of another size")
		}
		_, err = s.order(sw)
		check(t, err)
		_, err = s.order(sw) // again: nothing to do
		check(t, err)
		before, err := s.order(order{Op: "stats"})
		check(t, err)
		r.progress(t, 200)
		after, err := s.order(order{Op: "stats"})
		check(t, err)
		if n := after.Stats.Reads - before.Stats.Reads; n != 0 {
			t.Errorf("%d reads reached the session after the switch", n)
		}
		s.kill()
		r.progress(t, 100)
		_, err = s.order(order{Op: "unmount", Spec: orderSpec{ID: "other"}})
		check(t, err)
		if _, err := os.Stat(other.Target); err == nil {
			t.Error("mount made before the kill is not unmounted by the next worker")
		}
		// The session is aborted under its mounts; the switched one reads on.
		_ = unix.Unmount(s.session.Dir(), unix.MNT_FORCE)
		<-s.done
		r.progress(t, 100)
		r.finish(t)
		check(t, Clean(filepath.Join(s.dir, "state"), nil))
	})
}

func TestSwitchNeedsLoop(t *testing.T) {
	img := makeImage(t, 1, 10, 0)
	l := newLocal(t, Config{Prefer: FilePath})
	_, rec := l.mount(img, "a")
	if rec.Path != FilePath {
		t.Skip("needs a kernel with file-backed EROFS")
	}
	if err := l.SwitchToLocal(t.Context(), img.manifest, img.path); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("switch of a file-backed lower: %v", err)
	}
	if err := l.SwitchToLocal(t.Context(), digest.FromString("nobody"), img.path); !errdefs.IsNotFound(err) {
		t.Errorf("switch of nothing: %v", err)
	}
}

// Restore removes what a worker left half done and keeps the rest.
func TestRestoreHalfDone(t *testing.T) {
	img := makeImage(t, 1, 20, 0)
	bothPaths(t, func(t *testing.T, p Path) {
		s := supervise(t, session.Auto, workerConfig{Prefer: p})
		s.mount(img, "whole")
		tab := table{filepath.Join(s.dir, "state")}
		half := s.mount(makeImage(t, 2, 20, 0), "half")
		undone := s.mount(makeImage(t, 3, 20, 0), "undone")
		half.State, undone.State = Mounting, Unmounting
		half.MountID = 0
		check(t, tab.saveMount(&half))
		check(t, tab.saveMount(&undone))
		check(t, os.WriteFile(filepath.Join(tab.dir, mountsDir, "bad.json"), []byte("{"), 0o600))
		check(t, os.WriteFile(filepath.Join(tab.dir, mountsDir, "new.json.tmp"), []byte("{"), 0o600))
		s.kill()
		a, err := s.order(order{Op: "list"})
		for err == nil && a.Restarts == 0 {
			a, err = s.order(order{Op: "list"})
		}
		check(t, err)
		if len(a.Records) != 1 || a.Records[0].ID != "whole" {
			t.Errorf("restored %+v, want only the whole one", a.Records)
		}
		img.verify(t, filepath.Join(s.dir, "target-whole"))
		for _, rec := range []Record{half, undone} {
			if _, err := os.Stat(rec.Target); err == nil {
				t.Errorf("%s is still there", rec.Target)
			}
		}
		eventually(t, "images of the others are let go", func() bool {
			images, err := loadAll[imageRecord](filepath.Join(tab.dir, imagesDir))
			return err == nil && len(images) == 1
		})
	})
}

// The records of a session that has ended describe dead mounts.
func TestRestoreOtherSession(t *testing.T) {
	img := makeImage(t, 1, 20, 0)
	l := newLocal(t, Config{})
	_, rec := l.mount(img, "a")
	check(t, l.session.Close()) // as if the supervisor was killed
	s, err := session.Open(session.Config{Dir: l.session.Dir()})
	check(t, err)
	defer func() { check(t, s.Close()) }()
	link, err := s.Attach()
	check(t, err)
	defer func() { check(t, link.Close()) }()
	m, err := New(Config{StateDir: filepath.Join(l.dir, "state"), Link: link})
	check(t, err)
	check(t, m.Restore(t.Context(), func(Record) (File, error) { t.Error("dead image was opened"); return nil, os.ErrNotExist }))
	if len(m.List()) != 0 {
		t.Errorf("dead mounts are listed: %+v", m.List())
	}
	if _, err := os.Stat(rec.Target); err == nil {
		t.Error("dead mount is still at its target")
	}
	mounts, err := readMounts()
	check(t, err)
	if mounts.has(l.table.lower(img.manifest)) || mounts.has(l.table.upper("a")) {
		t.Error("dead lower or upper is still mounted")
	}
}

// An image that cannot be opened after a restart is asked for again.
func TestLateImage(t *testing.T) {
	img := makeImage(t, 1, 5, 0)
	now := time.Now()
	ready := false
	f := &lateFile{size: img.size, now: func() time.Time { return now }, open: func() (File, error) {
		if !ready {
			return nil, errdefs.ErrUnavailable
		}
		return openDisk(img.path)
	}}
	read := func() error { _, err := f.ReadAt(t.Context(), make([]byte, 10), 0); return err }
	if err := read(); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
	ready = true
	if err := read(); !errdefs.IsUnavailable(err) {
		t.Errorf("asked again at once: %v", err)
	}
	now = now.Add(2 * askEvery)
	check(t, read())
	check(t, f.Close())
	if err := read(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	f = &lateFile{size: img.size + 4096, now: time.Now, open: func() (File, error) { return openDisk(img.path) }}
	if err := read(); !errdefs.IsDataLoss(err) {
		t.Errorf("image of another size: %v", err)
	}
}

// A session that is unmounted or aborted from outside ends the supervisor.
func TestEndedSession(t *testing.T) {
	bothModes(t, func(t *testing.T, mode session.Mode) {
		s := supervise(t, mode, workerConfig{})
		s.mount(makeImage(t, 1, 5, 0), "a")
		check(t, unix.Unmount(filepath.Join(s.dir, "target-a"), unix.MNT_DETACH))
		_ = unix.Unmount(s.session.Dir(), unix.MNT_FORCE)
		<-s.done
		if !errors.Is(s.err, session.ErrEnded) {
			t.Errorf("supervisor ended with %v", s.err)
		}
	})
}

func TestReplacedWorker(t *testing.T) {
	img := makeImage(t, 2, 100, 0)
	restart := make(chan struct{})
	s := supervise(t, session.Auto, workerConfig{}, func(c *session.SuperviseConfig) { c.Restart = restart })
	rec := s.mount(img, "a")
	var r readers
	r.start(img, rec.Target, 2)
	r.progress(t, 20)
	restart <- struct{}{}
	r.progress(t, 50)
	r.finish(t)
	if a, err := s.order(order{Op: "stats"}); err != nil || a.Restarts != 1 {
		t.Errorf("restarts %d, %v", a.Restarts, err)
	}
}
