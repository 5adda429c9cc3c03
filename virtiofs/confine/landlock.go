package confine

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What each version of Landlock can take away (linux/landlock.h; the kernel's
// Documentation/userspace-api/landlock.rst): all of it is.
const (
	landlockFS1 = unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1
	landlockNet = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	// Not LANDLOCK_SCOPE_SIGNAL: before Linux 6.15 it keeps the threads of one process
	// from each other, by whose signals Go works. The filter has a rule for signals.
	landlockIPC = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
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

// landlock takes away all that this kernel knows, but files if they are used; what is
// open stays open. version is that of the kernel, 0 if it has nothing to take away.
func landlock(files bool) (version int, err error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno == unix.ENOSYS || errno == unix.EOPNOTSUPP {
		return 0, nil // not in this kernel, or turned off
	}
	if errno != 0 {
		return 0, errno
	}
	rules := landlockRules(int(v))
	if files {
		rules.Handled_access_fs = 0
	}
	if rules == (unix.LandlockRulesetAttr{}) {
		return 0, nil
	}
	// Kernels take a longer structure when what they do not know is zero.
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&rules)), unsafe.Sizeof(rules), 0)
	if errno != 0 {
		return 0, fmt.Errorf("make rules: %w", errno)
	}
	defer unix.Close(int(fd))
	return int(v), everywhere(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0)
}
