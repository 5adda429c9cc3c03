package passthrough

import (
	"encoding/binary"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// createAs sends a CREATE of a caller.
func (g *guest) createAs(uid, gid uint32, name string) syscall.Errno {
	g.t.Helper()
	msg := append(make([]byte, headerSize), text(vhosttest.U32(syscall.O_RDWR, 0o644, 0, 0), name)...)
	le := binary.LittleEndian
	le.PutUint32(msg[4:], opCreate)
	le.PutUint64(msg[16:], 1)
	le.PutUint32(msg[24:], uid)
	le.PutUint32(msg[28:], gid)
	_, errno := g.send(msg, replySize+entrySize+16)
	return errno
}

// expectCreate makes files as callers, who are uid and gid, and looks whose they are.
func expectCreate(t *testing.T, callers map[[2]uint32]any) {
	t.Helper()
	a := newArena(t)
	g := bootDir(t, a.share, Options{})
	for caller, want := range callers {
		errno := g.createAs(caller[0], caller[1], "file")
		if wantErrno, ok := want.(syscall.Errno); ok {
			if errno != wantErrno {
				t.Errorf("as %v: %v, want %v", caller, errno, wantErrno)
			}
			continue
		}
		var st unix.Stat_t
		must(t, unix.Lstat(a.path("file"), &st), os.Remove(a.path("file")))
		if got := [2]uint32{st.Uid, st.Gid}; errno != 0 || got != want {
			t.Errorf("as %v: %v, owned by %v, want %v", caller, errno, got, want)
		}
	}
	if st, err := os.Stat(a.share); err != nil || st.Mode().Perm() != 0o755 {
		t.Error(err)
	}
}

// Files belong to the guest's callers, where the process may give them away.
func TestCallers(t *testing.T) {
	const nobody = 1<<32 - 1 // -1, no number of a user
	if os.Getuid() != 0 {
		me := [2]uint32{uint32(os.Getuid()), uint32(os.Getgid())}
		expectCreate(t, map[[2]uint32]any{{0, 0}: me, me: me, {5, 0}: syscall.EPERM, {0, 5}: syscall.EPERM, {nobody, 0}: syscall.EPERM})
		return
	}
	expectCreate(t, map[[2]uint32]any{{0, 0}: [2]uint32{0, 0}, {5, 6}: [2]uint32{5, 6}, {0, 7}: [2]uint32{0, 7}, {8, 0}: [2]uint32{8, 0},
		{nobody, nobody}: syscall.EPERM, {1<<32 - 2, 1}: [2]uint32{1<<32 - 2, 1}})
	// And as an ordinary user.
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestCallers$", "-test.v")
	cmd.Dir, cmd.Env = "/", []string{"TMPDIR=/tmp"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestCallers") {
		t.Errorf("%v: %s", err, out)
	}
}

// A process that has no /proc any more opens it before; the directory may be open with
// O_PATH only.
func TestProc(t *testing.T) {
	a := newArena(t)
	must(t, os.WriteFile(a.path("file"), []byte("x"), 0o600))
	proc, err := os.OpenFile("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY, 0)
	must(t, err)
	defer proc.Close()
	root, err := os.OpenFile(a.share, unix.O_PATH|unix.O_DIRECTORY, 0)
	must(t, err)
	f, err := New(root, Options{Proc: proc})
	must(t, err, root.Close())
	n, err := f.nodes.get(1)
	must(t, err)
	fd, err := f.reopen(n.fd, unix.O_RDONLY)
	must(t, err, unix.Close(fd))
	n.put()
	must(t, f.Close())
	if _, err := proc.Stat(); err != nil {
		t.Errorf("the caller's directory was closed: %v", err)
	}
}
