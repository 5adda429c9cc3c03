package virtiofsd_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

const program = "github.com/tatami-containers/tatami/virtiofs/cmd/tatami-virtiofsd"

// build builds the program as it is shipped: without cgo.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tatami-virtiofsd")
	cmd := exec.Command("go", "build", "-o", path, program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", program, err, out)
	}
	return path
}

// process is a running program.
type process struct {
	cmd    *exec.Cmd
	stderr *bufio.Reader
}

// start starts the program and waits for the line that runtime-rs waits for.
func start(t *testing.T, bin string, args ...string) *process {
	t.Helper()
	return run(t, exec.Command(bin, args...))
}

func run(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{cmd: cmd}
	out, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stderr = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() }) // it may have ended
	p.await(t, "Waiting for vhost-user socket connection")
	return p
}

func (p *process) await(t *testing.T, text string) {
	t.Helper()
	for {
		line, err := p.stderr.ReadString('\n')
		if strings.Contains(line, text) {
			return
		}
		if err != nil {
			t.Fatalf("the program ended without %q: %v", text, err)
		}
	}
}

func (p *process) wait(t *testing.T) {
	t.Helper()
	rest, err := io.ReadAll(p.stderr)
	if err := errors.Join(err, p.cmd.Wait()); err != nil {
		t.Errorf("end of the program: %v: %s", err, rest)
	}
}

func TestProgram(t *testing.T) {
	bin := build(t)
	dir := t.TempDir()
	socket := filepath.Join(t.TempDir(), "s")
	t.Run("path", func(t *testing.T) {
		leaveStale(t, socket)
		p := start(t, bin, "--socket-path", socket, "--shared-dir", dir, "--cache", "auto")
		if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("socket: %v, %v", st, err)
		}
		fe := vhosttest.Dial(t, socket, 1<<20)
		fe.Negotiate(0)
		p.await(t, "VMM is connected")
		if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a second VMM could connect: %v", err)
		}
		confined(t, p.cmd.Process.Pid, os.Getuid() == 0)
		if err := fe.Conn.Close(); err != nil {
			t.Fatal(err)
		}
		p.wait(t)
	})
	t.Run("inherited", func(t *testing.T) {
		cmd := exec.Command(bin, "--shared-dir="+dir, "--fd=3")
		cmd.ExtraFiles = []*os.File{listen(t, socket)}
		if os.Getuid() == 0 { // as an ordinary user
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			for _, d := range []string{filepath.Dir(dir), dir, filepath.Dir(bin)} {
				if err := os.Chmod(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		p := run(t, cmd)
		fe := vhosttest.Dial(t, socket, 1<<20)
		fe.Negotiate(0)
		p.await(t, "VMM is connected")
		confined(t, p.cmd.Process.Pid, false)
		if err := fe.Conn.Close(); err != nil {
			t.Fatal(err)
		}
		p.wait(t)
	})
	t.Run("terminated", func(t *testing.T) {
		for _, connected := range []bool{false, true} {
			p := start(t, bin, "--socket-path", socket, "--shared-dir", dir)
			if connected {
				fe := vhosttest.Dial(t, socket, 1<<20)
				fe.Negotiate(0)
			}
			if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			p.wait(t)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for _, args := range [][]string{{"--shared-dir", "/none", "--socket-path", socket}, {"--shared-dir", dir, "--fd", "99"},
			{"--shared-dir", dir, "--socket-path", dir}, {"--shared-dir", dir, "--fd", "0"}} {
			if out, err := exec.Command(bin, args...).CombinedOutput(); err == nil || !strings.HasPrefix(string(out), "tatami-virtiofsd: ") {
				t.Errorf("%q: %v: %s", args, err, out)
			}
		}
	})
}

// listen makes a socket that a program inherits.
func listen(t *testing.T, path string) *os.File {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// leaveStale leaves the socket of a process that was killed.
func leaveStale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// confined looks at what every thread of the process may do. Only a process that was
// privileged can empty its bounding set.
func confined(t *testing.T, pid int, privileged bool) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		t.Fatal(threads, err)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"NoNewPrivs:\t1", "CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapAmb:\t0000000000000000"} {
			if !strings.Contains(string(b), want+"\n") {
				t.Errorf("%s without %q", path, want)
			}
		}
		if privileged && !strings.Contains(string(b), "CapBnd:\t0000000000000000\n") {
			t.Errorf("%s: capabilities in the bounding set", path)
		}
	}
}
