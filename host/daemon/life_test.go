package daemon

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

const share = "[[snapshotter]]\nname = \"share\"\nmode = \"share\"\n"

// A container reads its image while workers are killed and replaced under it,
// and containerd's calls go through meanwhile. In the end nothing is left.
func TestWorkersComeAndGo(t *testing.T) {
	bothModes(t, func(t *testing.T, mode session.Mode) {
		h := newHost(t, mode, share)
		h.start()
		img, s := h.push("app", 1), h.snapshotter("share")
		s.pull(img)
		root := h.container("c1", s, img)
		if !strings.Contains(h.log(), "mode="+string(mode)) {
			t.Errorf("the session is not in mode %s", mode)
		}
		must(t, os.WriteFile(filepath.Join(root, "own"), []byte("x"), 0o600))
		r := img.startReaders(t, root, 6)
		r.progress(20)
		slow := &slow{h: h, s: s, mount: h.mountHere, unmount: h.unmountHere}
		pid := h.awaitWorker(0)
		for n := range 6 {
			slow.during("the end of a worker", func() {
				if n%2 == 0 {
					check(t, syscall.Kill(pid, syscall.SIGKILL))
				} else {
					check(t, h.cmd.Process.Signal(syscall.SIGHUP))
				}
			})
			h.view1(s, img, fmt.Sprintf("v%d", n))
			pid = h.awaitWorker(pid)
			r.progress(20)
		}
		if h.reads() == 0 {
			t.Error("no read reached the last worker")
		}
		r.finish()
		h.unmountHere("c1")
		s.remove("c1")
		h.end(syscall.SIGTERM)
		h.checkNothingLeft()
	})
}

// view1 makes a view, reads in it, and removes it, with a worker that may die
// at any time.
func (h *host) view1(s *client, img image, key string) {
	h.t.Helper()
	repeated, err := again(func() error { _, err := s.View(s.ctx(), key, img.top()); return err })
	if err != nil && (!repeated || !errdefs.IsAlreadyExists(err)) {
		h.t.Fatalf("view %s: %v", key, err)
	}
	var mounts []mount.Mount
	_, err = again(func() (err error) { mounts, err = s.Mounts(s.ctx(), key); return err })
	check(h.t, err)
	root := filepath.Join(h.dir, "containers", key)
	must(h.t, os.MkdirAll(root, 0o700), mount.All(mounts, root))
	img.verifyAll(h.t, root)
	check(h.t, mount.UnmountAll(root, 0))
	s.remove(key)
}

// Without a service manager nothing is mounted after the end, even under a
// container that runs.
func TestEndUnderContainer(t *testing.T) {
	h := newHost(t, session.Auto, share)
	h.start()
	img, s := h.push("app", 2), h.snapshotter("share")
	s.pull(img)
	root := h.container("c1", s, img)
	img.verifyAll(t, root)
	h.end(syscall.SIGTERM)
	check(t, mount.UnmountAll(root, unix.MNT_DETACH)) // containerd's
	h.checkNothingLeft()
	// The next one mounts again what the snapshot needs.
	h.start()
	var mounts []mount.Mount
	_, err := again(func() (err error) { mounts, err = s.Mounts(s.ctx(), "c1"); return err })
	check(t, err)
	check(t, mount.All(mounts, root))
	img.verifyAll(t, root)
	check(t, mount.UnmountAll(root, 0))
}

// Both processes are killed. The next ones begin anew over what they left.
func TestDeadPredecessor(t *testing.T) {
	h := newHost(t, session.Auto, share+block)
	h.start()
	img, s := h.push("app", 3), h.snapshotter("share")
	s.pull(img)
	root := h.container("c1", s, img)
	img.verifyAll(t, root)
	h.snapshotter("block").pull(img)
	h.snapshotter("block").run("b1", img)
	h.end(syscall.SIGKILL) // its worker dies with it
	eventually(t, "the worker dies", func() bool { return len(h.processes()) == 0 })
	if len(h.mounts()) == 0 {
		t.Fatal("nothing was left to clean up")
	}
	h.start()
	check(t, mount.UnmountAll(root, unix.MNT_DETACH)) // containerd's, dead
	root = h.container("c2", s, img)
	img.verifyAll(t, root)
	check(t, mount.UnmountAll(root, 0))
	s.remove("c2")
	s.remove("c1")
	h.snapshotter("block").remove("b1")
	eventually(t, "nothing but the session is mounted", func() bool { return len(h.mounts()) == 1 })
}

// A second tatami-host over the same state leaves the first one's mounts alone.
func TestSecondProcess(t *testing.T) {
	h := newHost(t, session.Auto, share)
	h.start()
	img, s := h.push("app", 4), h.snapshotter("share")
	s.pull(img)
	root := h.container("c1", s, img)
	second := h.command()
	var said strings.Builder
	second.Stderr = &said
	var exit *exec.ExitError
	if err := second.Run(); !errors.As(err, &exit) || !strings.Contains(said.String(), fmt.Sprintf("another tatami-host (pid %d", h.cmd.Process.Pid)) {
		t.Errorf("second tatami-host: %v, %s", err, said.String())
	}
	img.verifyAll(t, root)
	h.view1(s, img, "v")
	check(t, mount.UnmountAll(root, 0))
}

// An upgrade: SIGHUP starts the program that lies at the path now.
func TestHangupTakesNewProgram(t *testing.T) {
	h := newHost(t, session.Auto, share)
	data, err := os.ReadFile(h.program)
	check(t, err)
	h.program = filepath.Join(h.dir, "tatami-host")
	check(t, os.WriteFile(h.program, data, 0o700))
	h.start()
	img, s := h.push("app", 5), h.snapshotter("share")
	s.pull(img)
	root := h.container("c1", s, img)
	must(t, os.WriteFile(h.program+".new", data, 0o700), os.Rename(h.program+".new", h.program))
	before := h.awaitWorker(0)
	check(t, h.cmd.Process.Signal(syscall.SIGHUP))
	pid := h.awaitWorker(before)
	eventually(t, "the worker runs the new program", func() bool {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		return err == nil && exe == h.program
	})
	img.verifyAll(t, root)
	check(t, mount.UnmountAll(root, 0))
}

// A changed configuration takes a restart. Until then all goes on as before.
func TestHangupWithOtherSnapshotters(t *testing.T) {
	h := newHost(t, session.Auto, share)
	h.start()
	img, s := h.push("app", 6), h.snapshotter("share")
	s.pull(img)
	root := h.container("c1", s, img)
	pid := h.awaitWorker(0)
	for text, want := range map[string]string{
		share + block: "other snapshotters than when tatami-host was started; restart it",
		strings.Replace(share, `"share"`, `"other"`, 1): "other snapshotters than when tatami-host was started; restart it",
		"nonsense = 1\n": "unknown key log.nonsense",
	} {
		h.configure(text)
		check(t, h.cmd.Process.Signal(syscall.SIGHUP))
		eventually(t, want, func() bool { return strings.Contains(h.log(), want) })
		check(t, os.Truncate(filepath.Join(h.dir, "log"), 0))
		if now := worker(h.cmd.Process.Pid); now != pid {
			t.Errorf("worker %d instead of %d", now, pid)
		}
		img.verifyAll(t, root)
		h.view1(s, img, "v")
	}
	// Should the worker die now, the next one serves what there is a socket for.
	h.configure(share + block)
	check(t, syscall.Kill(pid, syscall.SIGKILL))
	want := "a snapshotter is new since tatami-host was started; restart it"
	eventually(t, want, func() bool { return strings.Contains(h.log(), want) })
	h.view1(s, img, "v")
	img.verifyAll(t, root)
	check(t, mount.UnmountAll(root, 0))
}
