package containerd

import (
	"errors"
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

// keeperEnv makes the test binary the keeper of a node; its value is the name of
// the node's control groups.
const keeperEnv = "TATAMI_TEST_NODE_KEEPER"

// nodeKeeper starts process 1 of a node, says its process id, and removes the
// node's control groups when it has ended. That is when the standard input of
// both ends: also when the test was killed.
func nodeKeeper() int {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM) // what ends the test ends the input
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), initEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	cmd.Stdin, cmd.Stderr = os.Stdin, os.Stderr
	err := keep(cmd)
	if err2 := removeCgroups(os.Getenv(keeperEnv)); err == nil {
		err = err2
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		return 1
	}
	return 0
}

func keep(cmd *exec.Cmd) error {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		return errors.Join(fmt.Errorf("process 1 is not ready: %w", err), cmd.Wait())
	}
	fmt.Println(cmd.Process.Pid)
	return cmd.Wait()
}

// startInit starts process 1 of a node and returns its process id. The node ends
// with the test, or with the test's process, whatever ends that.
func startInit(t *testing.T, cgroup string) (pid int) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), keeperEnv+"="+cgroup)
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
		if err := cmd.Wait(); err != nil {
			t.Errorf("end of the node: %v", err)
		}
	})
	if _, err := fmt.Fscanln(out, &pid); err != nil {
		t.Fatalf("process 1 of the node: %v", err)
	}
	return pid
}

// removeCgroups removes the control groups under name in every hierarchy. Their
// processes are dead.
func removeCgroups(name string) error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && strings.HasPrefix(f[2], "cgroup") {
			err = errors.Join(err, removeCgroup(f[1]+"/"+name))
		}
	}
	return err
}

// removeCgroup removes a group with those below it. A group whose processes
// were killed just now is busy until the kernel is done with them.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeCgroup(dir+"/"+e.Name()))
		}
	}
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove control group %s: %w", dir, err)
		}
	}
}

// inNode returns the arguments that run a program in the namespaces of process
// pid.
func inNode(pid int, args ...string) []string {
	return append([]string{"nsenter", "--target", strconv.Itoa(pid), "--mount", "--pid", "--"}, args...)
}
