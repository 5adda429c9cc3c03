package confine

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests run this program again, built without cgo as the real one is: job says
// what it does, and kind in which sandbox.
const (
	jobKey  = "TATAMI_TEST_JOB"
	kindKey = "TATAMI_TEST_SANDBOX"
)

func TestMain(m *testing.M) {
	job := os.Getenv(jobKey)
	if job == "" {
		os.Exit(m.Run())
	}
	if err := do(job, Config{Sandbox: Sandbox(os.Getenv(kindKey)), Empty: os.Getenv("TMPDIR"), Nobody: os.Getuid() == 0}); err != nil {
		fmt.Println(job+":", err)
		os.Exit(3)
	}
	os.Exit(0)
}

func do(job string, c Config) error {
	if job == "walls" {
		return walls(c)
	}
	job, c.Files = strings.CutPrefix(job, filesJob)
	if c.Files && job == "work" {
		return filesWork(c)
	}
	f, err := openBefore()
	if err != nil {
		return err
	}
	if _, err := Enter(c); err != nil {
		return err
	}
	if job == "work" {
		return work(f)
	}
	return forbidden[job]()
}

// openBefore opens what a confined process is given.
func openBefore() (*os.File, error) { return os.Open("/proc/self/exe") }

// work is what a confined process is there for: files, memory, sockets, many
// threads, garbage, time.
func work(f *os.File) error {
	var group sync.WaitGroup
	errs := make(chan error, 100)
	for range cap(errs) {
		group.Go(func() { errs <- someWork(f) })
	}
	group.Wait()
	close(errs)
	var all []error
	for err := range errs {
		all = append(all, err)
	}
	runtime.GC()
	if f, err := os.Open("/"); !errors.Is(err, unix.EACCES) {
		all = append(all, fmt.Errorf("open: %v, %w", f, err))
	}
	return errors.Join(all...)
}

func someWork(f *os.File) error {
	runtime.LockOSThread() // one thread each
	b := make([]byte, 4<<20)
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var got int
	cerr := conn.Control(func(fd uintptr) {
		_, err = unix.Preadv2(int(fd), [][]byte{b[:100]}, 0, unix.RWF_NOWAIT)
		if errors.Is(err, unix.EAGAIN) { // not in the page cache
			err = nil
		}
		if err == nil {
			got, err = unix.Pread(int(fd), b, 0)
		}
	})
	if err = errors.Join(cerr, err); err != nil || got == 0 {
		return fmt.Errorf("read: %d, %w", got, err)
	}
	time.Sleep(time.Millisecond)
	for range 100 { // threads are interrupted by signals meanwhile
		runtime.Gosched()
	}
	return nil
}

// forbidden are calls that end the process; none may return.
var forbidden = map[string]func() error{
	"openat2":    func() error { _, err := unix.Openat2(unix.AT_FDCWD, ".", &unix.OpenHow{}); return err },
	"stat":       func() error { _, err := os.Stat("/"); return err },
	"socket":     func() error { _, err := net.Dial("unix", "/run/none"); return err },
	"exec":       func() error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"fork":       func() error { return call(unix.SYS_CLONE, uintptr(unix.SIGCHLD)) },
	"clone3":     func() error { return call(unix.SYS_CLONE3) },
	"ptrace":     func() error { return unix.PtraceAttach(os.Getpid()) },
	"kill":       func() error { return unix.Kill(os.Getppid(), unix.SIGTERM) },
	"tgkill":     func() error { return unix.Tgkill(os.Getpid()+1, os.Getpid()+1, 0) },
	"all":        func() error { return unix.Tgkill(-1, -1, 0) },
	"setuid":     func() error { return unix.Setuid(1) },
	"mount":      func() error { return unix.Mount("x", "/", "tmpfs", 0, "") },
	"unshare":    func() error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"code":       func() error { return mapCode(unix.PROT_READ | unix.PROT_EXEC) },
	"later code": laterCode,
	"dumpable":   func() error { return unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) },
	"seccomp":    func() error { return call(unix.SYS_SECCOMP) },
	"io_uring":   func() error { return call(unix.SYS_IO_URING_SETUP, 1) },
	"memfd":      func() error { _, err := unix.MemfdCreate("x", 0); return err },
	"ioctl":      func() error { _, err := unix.IoctlGetInt(0, unix.TIOCGPGRP); return err },
	"process_vm": func() error { return call(unix.SYS_PROCESS_VM_READV, uintptr(os.Getppid())) },
	"unknown":    func() error { return call(5000) },
}

func call(nr uintptr, args ...uintptr) error {
	var a [3]uintptr
	copy(a[:], args)
	if _, _, errno := unix.RawSyscall(nr, a[0], a[1], a[2]); errno != 0 {
		return errno
	}
	return nil
}

func mapCode(prot int) error {
	_, err := unix.Mmap(-1, 0, 4096, prot, unix.MAP_ANON|unix.MAP_PRIVATE)
	return err
}

func laterCode() error {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil // it shall have been possible
	}
	return unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
}

// walls looks at what holds without the filter of system calls.
func walls(c Config) error {
	if err := enterRoot(c); err != nil {
		return err
	}
	version, err := landlock(c.Files)
	if err != nil {
		return err
	}
	if changed, err := dropPrivileges(c); err != nil || !changed {
		return fmt.Errorf("drop privileges: %t, %w", changed, err)
	}
	var errs []error
	for name, try := range map[string]func() error{
		"read":   func() error { _, err := os.ReadFile("/etc/passwd"); return err },
		"up":     func() error { _, err := os.ReadFile("../../../../etc/passwd"); return err },
		"list":   func() error { _, err := os.ReadDir("/"); return err },
		"make":   func() error { return os.WriteFile("/new", nil, 0o644) },
		"mount":  func() error { return unix.Mount("x", "/", "tmpfs", 0, "") },
		"setuid": func() error { return unix.Setuid(1) },
		"parent": func() error { return unix.Kill(os.Getppid(), unix.SIGUSR2) },
	} {
		// Without Landlock an empty directory may be listed; the parent is nobody (0) in
		// a namespace, so that the signal goes to the process itself.
		if name == "list" && version == 0 || name == "parent" && os.Getppid() == 0 {
			continue
		}
		if err := try(); err == nil {
			errs = append(errs, fmt.Errorf("%s was possible", name))
		}
	}
	return errors.Join(errs...)
}

// binary builds this test.
func binary(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "confine-") //nolint:usetesting // another user runs it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "confine.test")
	cmd := exec.Command("go", "test", "-c", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	return path
}

// run does a job in a sandbox.
func run(t *testing.T, bin string, s Sandbox, job string) (string, *os.ProcessState) {
	t.Helper()
	cmd := exec.Command(bin)
	cmd.SysProcAttr = Attr(s)
	cmd.Env = []string{jobKey + "=" + job, kindKey + "=" + string(s), "TMPDIR=" + t.TempDir()}
	runtime.LockOSThread() // with the thread, the process would end
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState
}

func TestConfined(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: takes away what only root has")
	}
	bin := binary(t)
	for _, s := range []Sandbox{Namespace, Chroot, None} {
		t.Run(string(s), func(t *testing.T) {
			for _, job := range []string{"work", "walls"} {
				if out, st := run(t, bin, s, job); !st.Success() {
					t.Errorf("%s: %s: %s", job, st, out)
				}
			}
			for job := range forbidden {
				out, st := run(t, bin, s, job)
				if ws := st.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != unix.SIGSYS {
					t.Errorf("%s: %s: %s", job, st, out)
				}
			}
		})
	}
}

func TestNoSuchSandbox(t *testing.T) {
	if _, err := Enter(Config{Sandbox: "jail"}); err == nil || !strings.Contains(err.Error(), "jail") {
		t.Error(err)
	}
}
