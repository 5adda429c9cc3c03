package virtiofsd_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

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

// child is the id of the process that has the guest.
func (p *process) child(t *testing.T) int {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if pid, _ := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && pid > 0 {
			return pid
		}
	}
	t.Fatalf("the program has no child: %v", threads)
	return 0
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
		confined(t, p.child(t), os.Getuid() == 0)
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
		confined(t, p.child(t), false)
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
		for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapAmb:\t0000000000000000"} {
			if !strings.Contains(string(b), want+"\n") {
				t.Errorf("%s without %q", path, want)
			}
		}
		for _, want := range []string{"CapBnd:\t0000000000000000", "Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "Groups:\t "} {
			if privileged && !strings.Contains(string(b), want+"\n") {
				t.Errorf("%s without %q", path, want)
			}
		}
	}
	onlyItsOwn(t, pid)
}

// onlyItsOwn looks at what the process has open.
func onlyItsOwn(t *testing.T, pid int) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatal(fds, err)
	}
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err != nil || filepath.Base(fd) == "2" {
			continue // it was closed meanwhile; standard error
		}
		known := to == "/dev/null" || strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "anon_inode:") ||
			strings.HasPrefix(to, "/memfd:guest")
		if !known {
			t.Errorf("%s is %s", fd, to)
		}
	}
}

// gone waits until a process has ended.
func gone(t *testing.T, pid int) {
	t.Helper()
	for range 1000 {
		if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("process %d is still there", pid)
}

// newChild waits until another child has taken the place of one that ended.
func (p *process) newChild(t *testing.T, old int) int {
	t.Helper()
	p.await(t, "another takes over")
	p.await(t, "VMM is connected")
	pid := p.child(t)
	if pid == old {
		t.Fatalf("the child is still %d", pid)
	}
	return pid
}

// A child that ends is followed by another: the VMM goes on with that. But not for
// ever.
func TestChildrenKilled(t *testing.T) {
	bin := build(t)
	socket := filepath.Join(t.TempDir(), "s")
	p := start(t, bin, "--socket-path", socket, "--shared-dir", t.TempDir())
	fe := vhosttest.Dial(t, socket, 1<<20)
	fe.Negotiate(0)
	fe.AddMemory()
	ring := fe.NewRing(1, 16, 0)
	ring.Start()
	p.await(t, "VMM is connected")
	child := p.child(t)
	for range 5 {
		if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		gone(t, child)
		if len(fe.Ask(vhosttest.GetFeatures, nil)) != 8 {
			t.Error("no features")
		}
		child = p.newChild(t, child)
		confined(t, child, os.Getuid() == 0)
		lookupNone(t, fe, ring)
	}
	if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(p.stderr)
	_ = p.cmd.Wait() // its state is looked at
	if got := p.cmd.ProcessState.ExitCode(); got != 1 || err != nil || !strings.Contains(string(rest), "6 children have ended within 20s: child has ended: signal: killed") {
		t.Errorf("exit code %d, %v: %s", got, err, rest)
	}
	if _, err := fe.Conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the VMM sees %v", err)
	}
}

// lookupNone sends a request, of which only the answer matters.
func lookupNone(t *testing.T, fe *vhosttest.Frontend, ring *vhosttest.Ring) {
	t.Helper()
	const at, header = 0x8000, 40
	le := binary.LittleEndian
	b := fe.Mem[at : at+header]
	le.PutUint32(b, header)
	le.PutUint32(b[4:], 17) // STATFS
	le.PutUint64(b[8:], 7)  // unique
	le.PutUint64(b[16:], 1) // root
	ring.SetDesc(0, vhosttest.Desc{Addr: vhosttest.GuestBase + at, Len: header, Flags: vhosttest.Next, Next: 1})
	ring.SetDesc(1, vhosttest.Desc{Addr: vhosttest.GuestBase + at + 0x100, Len: 0x100, Flags: vhosttest.Write})
	ring.Offer(0)
	if head, n, ok := ring.WaitUsed(60_000); !ok || head != 0 || n < 16 || le.Uint64(fe.Mem[at+0x108:]) != 7 {
		t.Errorf("answer: chain %d, %d bytes, %t", head, n, ok)
	}
}

// Whichever way the parent ends: the child does, and the VMM sees it. Without a VMM,
// the end of the child is the end.
func TestProcessesEndTogether(t *testing.T) {
	bin := build(t)
	dir := t.TempDir()
	socket := filepath.Join(t.TempDir(), "s")
	for _, tc := range []struct {
		name             string
		signal           syscall.Signal
		child, connected bool
		code             int
	}{
		{"parent killed", syscall.SIGKILL, false, false, -1},
		{"parent killed with a VMM", syscall.SIGKILL, false, true, -1},
		{"parent terminated", syscall.SIGTERM, false, false, 0},
		{"parent terminated with a VMM", syscall.SIGTERM, false, true, 0},
		{"child killed", syscall.SIGKILL, true, false, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := start(t, bin, "--socket-path", socket, "--shared-dir", dir)
			var fe *vhosttest.Frontend
			if tc.connected {
				fe = vhosttest.Dial(t, socket, 1<<20)
				fe.Negotiate(0)
			}
			child, pid := p.child(t), p.cmd.Process.Pid
			if tc.child {
				pid = child
			}
			if err := syscall.Kill(pid, tc.signal); err != nil {
				t.Fatal(err)
			}
			rest, err := io.ReadAll(p.stderr)
			_ = p.cmd.Wait() // its state is looked at
			gone(t, child)
			if got := p.cmd.ProcessState.ExitCode(); got != tc.code || err != nil || tc.child != strings.Contains(string(rest), "child has ended: signal: killed") {
				t.Errorf("exit code %d, %v: %s", got, err, rest)
			}
			if tc.connected {
				if _, err := fe.Conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the VMM sees %v", err)
				}
			}
			if _, err := os.Stat(socket); err == nil && tc.code != -1 {
				t.Error("the socket is still there")
			}
		})
	}
}

// TestSandboxes starts the program where it may make namespaces, and where not.
func TestSandboxes(t *testing.T) {
	bin := build(t)
	if err := os.Chmod(filepath.Dir(bin), 0o755); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes namespaces and changes users")
	}
	for _, tc := range []struct {
		name      string
		args      []string
		container bool // without CAP_SYS_ADMIN
		want      string
	}{
		{"root", nil, false, `"sandbox":"namespace"`},
		{"chosen", []string{"--sandbox=chroot"}, false, `"sandbox":"chroot"`},
		{"least", []string{"--sandbox=none"}, false, `"sandbox":"none"`},
		{"container", nil, true, "protection is weaker"},
		{"container, namespace", []string{"--sandbox=namespace"}, true, "give this process CAP_SYS_ADMIN"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			args := append([]string{"--socket-path", filepath.Join(t.TempDir(), "s"), "--shared-dir", dir}, tc.args...)
			cmd := exec.Command(bin, args...)
			if tc.container {
				cmd = exec.Command("setpriv", append([]string{"--bounding-set=-sys_admin", "--inh-caps=-sys_admin", bin}, args...)...)
			}
			out, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			p := &process{cmd, bufio.NewReader(out)}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cmd.Process.Kill() // it may have ended
				_ = cmd.Wait()
			})
			p.await(t, tc.want)
		})
	}
}
