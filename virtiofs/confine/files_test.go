package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// filesJob begins the jobs of a process that uses files.
const filesJob = "files "

// filesWork is what such a process is there for: files of any owner below a directory
// that it was given.
func filesWork(c Config) error {
	dir, err := os.MkdirTemp("", "") // in the directory that the test removes
	if err != nil {
		return err
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	if err := syscall.Setgroups([]int{8}); err != nil { // as some who start it
		return err
	}
	if _, err := Enter(c); err != nil {
		return err
	}
	runtime.LockOSThread() // the identity is a thread's
	unix.Umask(0)
	var errs []error
	did := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	did("mkdir", unix.Mkdirat(fd, "d", 0o700))
	did("chown", unix.Fchownat(fd, "d", 7, 8, 0))
	sub, err := unix.Openat2(fd, "d", &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	did("openat2", err)
	_, err = unix.SetfsuidRetUid(9)
	did("setfsuid", err)
	if f, err := unix.Openat(sub, "f", unix.O_CREAT|unix.O_RDWR, 0o600); !errors.Is(err, unix.EACCES) {
		errs = append(errs, fmt.Errorf("another user's directory: %d, %w", f, err))
	}
	_, err = unix.SetfsuidRetUid(os.Geteuid())
	did("setfsuid", err)
	f, err := unix.Openat(sub, "f", unix.O_CREAT|unix.O_RDWR, 0o600)
	did("create", err)
	_, err = unix.Pwritev2(f, [][]byte{[]byte("text")}, 0, 0)
	did("write", err)
	did("mknod", unix.Mknodat(sub, "whiteout", unix.S_IFCHR, 0))
	did("rename", unix.Renameat2(sub, "f", sub, "g", unix.RENAME_NOREPLACE))
	did("unlink", unix.Unlinkat(sub, "g", 0))
	var st unix.Statx_t
	did("statx", unix.Statx(sub, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st))
	if st.Uid != 7 || st.Gid != 8 {
		errs = append(errs, fmt.Errorf("owner %d:%d", st.Uid, st.Gid))
	}
	errs = append(errs, setGroupID(sub))
	// By a path there is nothing.
	if other, err := unix.Openat(unix.AT_FDCWD, "/etc/passwd", unix.O_RDONLY, 0); c.Sandbox != None && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, fmt.Errorf("open a path: %d, %w", other, err))
	}
	return errors.Join(errs...)
}

// setGroupID makes a program as one who is not in the group of the directory: it must
// not run as that group.
func setGroupID(dir int) error {
	if err := unix.Fchownat(dir, "", 9, 8, unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	if err := unix.Fchmodat(dir, ".", 0o2777, 0); err != nil {
		return err
	}
	for _, set := range []func(int) (int, error){unix.SetfsgidRetGid, unix.SetfsuidRetUid} {
		if _, err := set(9); err != nil {
			return err
		}
	}
	f, err := unix.Openat(dir, "program", unix.O_CREAT|unix.O_RDWR, 0o2775)
	if err != nil {
		return err
	}
	var st unix.Statx_t
	err = unix.Statx(f, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st)
	if err == nil && (st.Gid != 8 || st.Mode&unix.S_ISGID != 0) {
		err = fmt.Errorf("a program of group %d has mode %o", st.Gid, st.Mode)
	}
	return err
}

func TestFiles(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: makes namespaces and mounts")
	}
	bin := binary(t)
	if out, st := run(t, bin, Namespace, filesJob+"work"); !st.Success() {
		t.Errorf("work: %s: %s", st, out)
	}
	usual := map[string]bool{"openat2": true}
	for job := range forbidden {
		out, st := run(t, bin, Namespace, filesJob+job)
		ws, ok := st.Sys().(syscall.WaitStatus)
		if killed := ok && ws.Signaled() && ws.Signal() == unix.SIGSYS; killed == usual[job] {
			t.Errorf("%s: %s: %s", job, st, out)
		}
	}
}
