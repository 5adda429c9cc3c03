package session

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// roleEnv makes the test binary a worker that only lives (and dies).
const roleEnv = "TATAMI_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "":
		os.Exit(m.Run())
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
	}
	l, err := Inherit()
	if err != nil {
		os.Exit(2)
	}
	// Told by file name: the number of restarts and of extra files.
	name := filepath.Join(os.Getenv("TATAMI_TEST_DIR"), "started", strings.Repeat("i", l.Restarts()+1))
	if os.WriteFile(name, []byte(l.Mode), 0o600) != nil || len(l.Extra()) != 1 {
		os.Exit(3)
	}
	if os.Getenv(roleEnv) == "dying" {
		os.Exit(1)
	}
	select {}
}

func open(t *testing.T, mode Mode) *Session {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	s, err := Open(Config{Dir: filepath.Join(t.TempDir(), "s"), Mode: mode})
	if mode == Direct && errdefs.IsFailedPrecondition(err) {
		t.Skipf("needs a newer kernel: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// run supervises a worker of a role and returns how to end it and its result.
func run(t *testing.T, mode Mode, role string, cfg SuperviseConfig) (s *Session, dir string, stop func(), result <-chan error) {
	t.Helper()
	s, dir = open(t, mode), t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "started"), 0o700); err != nil {
		t.Fatal(err)
	}
	extra, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = extra.Close() })
	cfg.Session, cfg.Command, cfg.ExtraFiles = s, []string{"/proc/self/exe"}, []*os.File{extra}
	cfg.Env = append(os.Environ(), roleEnv+"="+role, "TATAMI_TEST_DIR="+dir)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Supervise(ctx, cfg) }()
	return s, dir, cancel, done
}

// await waits until n workers have started.
func await(t *testing.T, dir string, n int) {
	t.Helper()
	for range 2000 {
		if _, err := os.Stat(filepath.Join(dir, "started", strings.Repeat("i", n))); err == nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("worker %d never started", n)
}

func TestDyingWorkerIsStartedAgain(t *testing.T) {
	for _, mode := range []Mode{Direct, Journal} {
		t.Run(string(mode), func(t *testing.T) {
			var restarts atomic.Int64
			cleaned := false
			s, dir, stop, result := run(t, mode, "dying", SuperviseConfig{
				Restarts: &restarts, Cleanup: func(context.Context) error { cleaned = true; return nil },
			})
			await(t, dir, 4)
			stop()
			if err := <-result; err != nil {
				t.Errorf("supervisor ended with %v", err)
			}
			if restarts.Load() < 3 || !cleaned {
				t.Errorf("%d restarts, cleaned up: %v", restarts.Load(), cleaned)
			}
			if !s.Ended() {
				t.Error("session goes on after its supervisor")
			}
			if mounted(t, s.Dir()) {
				t.Error("session is still mounted")
			}
		})
	}
}

func mounted(t *testing.T, dir string) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(b), " "+dir+" ")
}

// A worker that does not heed SIGTERM is killed after the grace.
func TestStubbornWorker(t *testing.T) {
	_, dir, stop, result := run(t, Auto, "stubborn", SuperviseConfig{Grace: 50 * time.Millisecond})
	await(t, dir, 1)
	stop()
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// The session ends while its worker sleeps and notices nothing.
func TestSessionEndsUnderWorker(t *testing.T) {
	s, dir, _, result := run(t, Auto, "sleeping", SuperviseConfig{})
	await(t, dir, 1)
	_ = unix.Unmount(s.Dir(), unix.MNT_FORCE)
	if err := <-result; !errors.Is(err, ErrEnded) {
		t.Errorf("supervisor ended with %v", err)
	}
}

func TestWorkerThatCannotStart(t *testing.T) {
	s := open(t, Auto)
	err := Supervise(t.Context(), SuperviseConfig{Session: s, Command: []string{"/nonexistent/worker"}})
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/nonexistent/worker") {
		t.Errorf("got %v", err)
	}
}

// A dead session at the directory is replaced.
func TestOpenOverDeadSession(t *testing.T) {
	s := open(t, Auto)
	if err := s.fuse.Close(); err != nil { // as when a supervisor is killed
		t.Fatal(err)
	}
	again, err := Open(Config{Dir: s.Dir()})
	if err != nil {
		t.Fatal(err)
	}
	if again.Ended() {
		t.Error("new session has ended already")
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	s.closed.Store(true)
	s.closeOnce.Do(func() {})
}

func TestInheritNeedsSupervisor(t *testing.T) {
	if _, err := Inherit(); err == nil {
		t.Error("inherited from nobody")
	}
}
