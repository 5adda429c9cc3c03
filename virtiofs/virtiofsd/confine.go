package virtiofsd

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// confine takes from this process, for ever, what it does not need to serve dir:
// new privileges by exec, all capabilities, and by Landlock, where the kernel has
// it, every file but those below dir (to be read), TCP, and signals and abstract
// sockets of others. What is open stays open. landlock is the version that was
// used, 0 for none.
//
// The system calls are made on all threads, which Go can do in programs without
// cgo only.
func confine(dir *os.File) (landlock int, err error) {
	if err := everywhere(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return 0, fmt.Errorf("set no_new_privs (build with CGO_ENABLED=0): %w", err)
	}
	if landlock, err = restrict(dir); err != nil {
		return 0, fmt.Errorf("restrict with Landlock: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return 0, fmt.Errorf("drop capabilities: %w", err)
	}
	return landlock, nil
}

func everywhere(trap, a1, a2 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// dropCapabilities empties all sets. Without CAP_SETPCAP the bounding set stays,
// which is of no use with no_new_privs.
func dropCapabilities() error {
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		err := everywhere(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) { // not ours to drop, not known
			break
		}
		if err != nil {
			return err
		}
	}
	if err := everywhere(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL); err != nil {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	// Pointers must become numbers in the call itself (package unsafe, rule 4).
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none)), 0); errno != 0 {
		return errno
	}
	return nil
}

// What each version of Landlock can take away (linux/landlock.h; the kernel's
// Documentation/userspace-api/landlock.rst): all of it is.
const (
	landlockFS1 = unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1
	landlockNet = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	landlockIPC = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
)

func landlockRules(version int) unix.LandlockRulesetAttr {
	a := unix.LandlockRulesetAttr{Handled_access_fs: landlockFS1}
	if version >= 2 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if version >= 3 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if version >= 4 {
		a.Handled_access_net = landlockNet
	}
	if version >= 5 {
		a.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if version >= 6 {
		a.Scoped = landlockIPC
	}
	return a
}

func restrict(dir *os.File) (version int, err error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno == unix.ENOSYS || errno == unix.EOPNOTSUPP {
		return 0, nil // not in this kernel, or turned off
	}
	if errno != 0 {
		return 0, errno
	}
	rules := landlockRules(int(v))
	// Kernels take a longer structure when what they do not know is zero.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&rules)), unsafe.Sizeof(rules), 0)
	if errno != 0 {
		return 0, fmt.Errorf("make rules: %w", errno)
	}
	defer unix.Close(int(fd))
	below := unix.LandlockPathBeneathAttr{Parent_fd: int32(dir.Fd()),
		Allowed_access: unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR}
	if _, _, errno = unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&below)), 0, 0, 0); errno != 0 {
		return 0, fmt.Errorf("allow %s: %w", dir.Name(), errno)
	}
	return int(v), everywhere(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0)
}
