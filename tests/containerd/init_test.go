package containerd

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// initEnv makes the test binary the first process of a node.
const initEnv = "TATAMI_TEST_NODE_INIT"

// nodeInit is process 1 of a node's PID namespace. It gives the node a /proc,
// empty /run and /opt, and mounts that nobody else sees, reaps, and ends with its standard
// input. With it the kernel ends all processes of the node, and with those go
// its mounts.
func nodeInit() int {
	if err := nodeMounts(); err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		return 1
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	go func() {
		for range died {
			for pid := 1; pid > 0; {
				pid, _ = syscall.Wait4(-1, nil, syscall.WNOHANG, nil) // no child is no matter
			}
		}
	}()
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin) // its end is all that counts
	return 0
}

func nodeMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, dir := range []string{"/run", "/opt"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// startInit starts process 1 of a node and returns its process id. The node ends
// with the test, or with the test's process, whatever ends that.
func startInit(t *testing.T) int {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), initEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // its exit code says nothing of the test
	})
	answer := make([]byte, 6)
	if _, err := io.ReadFull(out, answer); err != nil || string(answer) != "ready\n" {
		t.Fatalf("process 1 of the node: %q, %v", answer, err)
	}
	return cmd.Process.Pid
}

// removeCgroups removes the control groups under name in every hierarchy. Their
// processes are dead.
func removeCgroups(t *testing.T, name string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && strings.HasPrefix(f[2], "cgroup") {
			removeCgroup(t, f[1]+"/"+name)
		}
	}
}

// removeCgroup removes a group with those below it. A group whose processes
// were killed just now is busy until the kernel is done with them.
func removeCgroup(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(t, dir+"/"+e.Name())
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || err == unix.ENOENT {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("remove control group %s: %v", dir, err)
			return
		}
	}
}

// inNode returns the arguments that run a program in the namespaces of process
// pid.
func inNode(pid int, args ...string) []string {
	return append([]string{"nsenter", "--target", strconv.Itoa(pid), "--mount", "--pid", "--"}, args...)
}
