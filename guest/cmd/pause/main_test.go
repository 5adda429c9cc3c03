package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asPause makes the test binary pause.
const asPause = "TATAMI_TEST_AS_PAUSE"

func TestMain(m *testing.M) {
	if os.Getenv(asPause) != "" {
		ends, children := catch()
		fmt.Println("ready") // the test waits for it
		serve(ends, children)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// start runs pause, ready for signals, as the first process of a PID namespace of its own.
func start(t *testing.T) *exec.Cmd {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes a PID namespace")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), asPause+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestEndsWhenAsked(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		cmd := start(t)
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %v", s, err)
		}
	}
}

// However many children have ended, being asked to end is heard.
func TestChildrenCrowdOutNothing(t *testing.T) {
	ends, children := catch()
	defer signal.Reset()
	for range 100 { // one by one, each of them taken note of
		if err := exec.CommandContext(t.Context(), "true").Run(); err != nil {
			t.Fatal(err)
		}
	}
	<-children
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ends:
	case <-time.After(20 * time.Second):
		t.Error("not heard")
	}
}

// TestReapsOrphans lets processes that have lost their parent end in the
// namespace; they must not stay as zombies.
func TestReapsOrphans(t *testing.T) {
	cmd := start(t)
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // Wait says what came of it
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	const orphans = 20
	pids := filepath.Join(t.TempDir(), "pids")
	script := fmt.Sprintf("for i in $(seq %d); do (sleep 0.1 & echo $! >>%s); done", orphans, pids)
	enter := exec.CommandContext(t.Context(), "nsenter", "--pid", "--target", fmt.Sprint(cmd.Process.Pid), "sh", "-c", script)
	if out, err := enter.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if b, err := os.ReadFile(pids); err != nil || strings.Count(string(b), "\n") != orphans {
		t.Fatalf("orphans: %q, %v", b, err)
	}
	var left string
	for range 1000 {
		if left = children(t, cmd.Process.Pid); left == "" {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("children that were not waited for: %s", left)
}

// children lists the children of all threads of a process.
func children(t *testing.T, pid int) string {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil || len(lists) == 0 {
		t.Fatalf("children of %d: %v, %v", pid, lists, err)
	}
	var all string
	for _, l := range lists {
		b, _ := os.ReadFile(l) // threads come and go
		all += string(b)
	}
	return all
}
