package kata

import (
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

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// asVMM makes the test binary a VMM that brings a connection to the socket it
// is told: "<socket> <jail, may be empty> <user>".
const asVMM = "TATAMI_TEST_AS_VMM"

func TestMain(m *testing.M) {
	if how := os.Getenv(asVMM); how != "" {
		if err := vmm(how); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// vmm enters the jail, becomes the user, connects and sends a word.
func vmm(how string) error {
	f := strings.Split(how, " ")
	uid, err := strconv.Atoi(f[2])
	if err != nil {
		return err
	}
	if f[1] != "" {
		if err := errors.Join(syscall.Chroot(f[1]), os.Chdir("/")); err != nil {
			return err
		}
	}
	if uid != os.Getuid() {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
			return err
		}
	}
	c, err := net.Dial("unix", f[0])
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.WriteString(c, "guest")
	return err
}

// connect runs a VMM.
func connect(t *testing.T, at string, uid int, jail string) error {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), asVMM+"="+at+" "+jail+" "+strconv.Itoa(uid))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func accepts(t *testing.T, l net.Listener) {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if data, err := io.ReadAll(c); err != nil || string(data) != "guest" {
		t.Errorf("read %q, %v", data, err)
	}
}

// jailDir is a directory that another user owns, with a VMM's socket in it, at a
// path as long as runtime-rs makes it for a jailed Firecracker: there is no room
// for the port.
func jailDir(t *testing.T, uid int) string {
	t.Helper()
	top, err := os.MkdirTemp("", "") //nolint:usetesting // the path must be short, and others go through it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(top); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(top, 0o755); err != nil { //nolint:gosec // others go through it
		t.Fatal(err)
	}
	const tail = "/root/kata.hvsock"
	dir := filepath.Join(top, strings.Repeat("f", maxPath-4-len(top)-1-len(tail)), "root")
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // as above
		t.Fatal(err)
	}
	path := filepath.Join(dir, "kata.hvsock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() }) // the VMM is over
	if uid != os.Getuid() {
		if err := errors.Join(os.Chown(path, uid, uid), os.Chown(dir, uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// A VMM under another user, in the directory or in a jail, can connect; a third
// user cannot. The path of the socket is longer than an address has room for.
func TestListenForAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: gives a socket to another user")
	}
	path := jailDir(t, 1234)
	if addr := vsock.HybridListenPath(path, 2110); len(addr) <= maxPath {
		t.Fatalf("%s is too short a path for this test", addr)
	}
	l, err := Listen(path, 2110)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	st, err := os.Lstat(vsock.HybridListenPath(path, 2110))
	if err != nil || st.Mode() != os.ModeSocket|0o600 || st.Sys().(*syscall.Stat_t).Uid != 1234 || st.Sys().(*syscall.Stat_t).Gid != 1234 {
		t.Errorf("socket %v, %v", st, err)
	}
	if err := connect(t, "/kata.hvsock_2110", 1234, filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	accepts(t, l)
	if err := connect(t, "/kata.hvsock_2110", 4321, filepath.Dir(path)); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("another user: %v", err)
	}
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := os.Lstat(vsock.HybridListenPath(path, 2110)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
}

// Without a VMM's socket the directory says who the VMM is.
func TestListenBeforeTheVMM(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: gives a socket to another user")
	}
	path := jailDir(t, 1234)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path, 2111)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	st, err := os.Lstat(vsock.HybridListenPath(path, 2111))
	if err != nil || st.Sys().(*syscall.Stat_t).Uid != 1234 {
		t.Errorf("socket %v, %v", st, err)
	}
}

// The socket of a dead process is replaced; what is served, and what is no
// socket, is not.
func TestListenTaken(t *testing.T) {
	path := jailDir(t, os.Getuid())
	at := vsock.HybridListenPath(filepath.Base(path), 1)
	t.Chdir(filepath.Dir(path)) // the path is too long to bind there otherwise
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: at, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	if _, err := Listen(path, 1); !errdefs.IsAlreadyExists(err) {
		t.Errorf("one that is served: %v", err)
	}
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := connect(t, at, os.Getuid(), ""); err != nil {
		t.Error(err)
	}
	accepts(t, l)
	// Whoever has the directory put something else there: that stays.
	if err := errors.Join(os.Remove(at), os.WriteFile(at, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := Listen(path, 1); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a file: %v", err)
	}
	if err := errors.Join(os.Remove(at), os.Symlink("victim", at)); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, 1); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a link: %v", err)
	}
	if _, err := os.Lstat("victim"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was made behind the link: %v", err)
	}
}

// A directory that is a link, or lies behind one, is refused.
func TestListenBehindALink(t *testing.T) {
	path := jailDir(t, os.Getuid())
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(path), link); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{filepath.Join(link, "kata.hvsock"), filepath.Join(link, "..", "root", "kata.hvsock"), filepath.Join(link, "absent", "s")} {
		if l, err := Listen(at, 1); err == nil {
			t.Errorf("%s is served", at)
			_ = l.Close() // the error is that it is there
		}
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*_1"))
	if err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
