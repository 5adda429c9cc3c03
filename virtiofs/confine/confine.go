// Package confine takes from a process, for ever, what it does not need to serve
// descriptors that others opened: the node's files, programs, network, devices,
// identities, capabilities, and system calls. tatami-virtiofsd does it to its
// child before that sees a byte of a guest.
//
// Several walls stand behind each other, so that a hole in one is none:
//
//   - namespaces of its own (mount, process, network, IPC, host name) with an empty
//     root directory, or a chroot into one;
//   - the user and group 65534 ("nobody") instead of root, no capabilities in any
//     set, no_new_privs, no core dumps, no tracing by others of that user;
//   - Landlock (linux/landlock.h), where the kernel has it: no file, no TCP, no
//     abstract socket;
//   - seccomp: a list of the system calls that Go's runtime and the device use; any
//     other ends the process, as with Rust's virtiofsd (its option --seccomp).
//
// The calls are made on all threads, which Go can do in programs without cgo only.
package confine

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Sandbox says how a process is kept from the node's directories; the names are
// those of virtiofsd.
type Sandbox string

// The sandboxes, the strongest first. The rest of the confinement is the same for
// all, so that the empty root is a second wall behind seccomp and Landlock.
const (
	Namespace Sandbox = "namespace"
	Chroot    Sandbox = "chroot" // as root only
	None      Sandbox = "none"
)

// nobody is the user and group id that the kernel itself uses for "somebody else"
// (/proc/sys/kernel/overflowuid).
const nobody = 65534

// Config says how to confine a process.
type Config struct {
	Sandbox Sandbox
	// Empty is the path of an empty directory, for Chroot.
	Empty string
	// Nobody has the process change its user to nobody: for those who are root.
	Nobody bool
	// Files is for a process that uses directories of the node, which it gets as
	// descriptors of mounts of their own: with the system calls and the capabilities of
	// those who own files (see files.go), and without Landlock's rules for files, as
	// there is no path that one could name. It remains the user that it is.
	Files bool
	// Trap has a forbidden system call reported by Go's runtime, with its stack,
	// before the process ends.
	Trap bool
}

// Attr is what a process needs at its start to be confined with s. It ends with the
// thread that starts it.
func Attr(s Sandbox) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if s != Namespace {
		return a
	}
	a.Cloneflags = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if uid := os.Geteuid(); uid != 0 {
		a.Cloneflags |= unix.CLONE_NEWUSER // in which it may make the others
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return a
}

// Enter confines this process, which was started with the Attr of the sandbox, and
// tells of what is missing. ErrFailedPrecondition: the sandbox is not possible
// here, another may be. After any error the process must end.
func Enter(c Config) (missing []string, err error) {
	if err := enterRoot(c); err != nil {
		return nil, fmt.Errorf("sandbox %s: %w: %w", c.Sandbox, errdefs.ErrFailedPrecondition, err)
	}
	if err := everywhere(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return nil, fmt.Errorf("set no_new_privs (build with CGO_ENABLED=0): %w", err)
	}
	v, err := landlock(c.Files)
	if err != nil {
		return nil, fmt.Errorf("restrict with Landlock: %w", err)
	}
	if v == 0 {
		missing = append(missing, "Landlock: this kernel has none")
	}
	changed, err := dropPrivileges(c)
	if err != nil {
		return nil, fmt.Errorf("drop privileges: %w", err)
	}
	if !changed {
		missing = append(missing, "a user of its own: CAP_SETUID and CAP_SETGID are needed")
	}
	if err := filter(c); err != nil {
		return nil, fmt.Errorf("filter system calls: %w", err)
	}
	return missing, nil
}

func everywhere(trap, a1, a2 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(trap, a1, a2, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// dropPrivileges leaves the process without capabilities but those for files, and as
// nobody's if asked to. False means that it may not change its user.
func dropPrivileges(c Config) (changed bool, err error) {
	kept := c.capabilities()
	if err := dropBounding(kept); err != nil {
		return false, err
	}
	changed = true
	if c.Nobody && !c.Files {
		if changed, err = becomeNobody(); err != nil {
			return false, err
		}
	}
	if c.Files {
		// Or set-group-ID bits of these groups would stay on files that are made for the
		// guest's users (CVE-2022-0358). An ordinary user may not, and makes none for others.
		if err := syscall.Setgroups(nil); err != nil && !errors.Is(err, unix.EPERM) {
			return false, err
		}
	}
	if err := dropCapabilities(kept); err != nil {
		return false, err
	}
	// Others of the same user shall neither trace it nor read its memory. A change
	// of the user takes back that it ends with its parent (PR_SET_PDEATHSIG(2const)).
	return changed, errors.Join(everywhere(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0),
		everywhere(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL)))
}

// dropBounding takes all but kept, a set of bits, from the bounding set. Without
// CAP_SETPCAP it stays, which is of no use with no_new_privs.
func dropBounding(kept uint64) error {
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if kept&(1<<c) != 0 {
			continue
		}
		err := everywhere(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) { // not ours to drop, not known
			break
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// becomeNobody is false where the process may not.
func becomeNobody() (bool, error) {
	for _, change := range []func() error{
		func() error { return syscall.Setgroups(nil) },
		func() error { return syscall.Setresgid(nobody, nobody, nobody) },
		func() error { return syscall.Setresuid(nobody, nobody, nobody) },
	} {
		err := change()
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) { // no such user in this namespace
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

// dropCapabilities leaves of what the process has what is in kept.
func dropCapabilities(kept uint64) error {
	if err := everywhere(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL); err != nil {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return err
	}
	for i := range sets {
		left := sets[i].Permitted & uint32(kept>>(32*i))
		sets[i] = unix.CapUserData{Effective: left, Permitted: left}
	}
	// Pointers must become numbers in the call itself (package unsafe, rule 4).
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&sets)), 0); errno != 0 {
		return errno
	}
	return nil
}
