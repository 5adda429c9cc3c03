package confine

import (
	"fmt"
	"os"
	"slices"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"
)

// allowed are the system calls of a confined process, on amd64 and arm64. None of
// them names a file, makes a socket, or reaches another process; descriptors come
// by recvmsg only.
var allowed = []string{
	// The device: requests and what they read, and the sockets it was given.
	"read", "write", "readv", "writev", "pread64", "preadv", "preadv2", "recvmsg", "sendmsg", "recvfrom", "sendto",
	"close", "dup", "fcntl", "fstat", "shutdown", "getsockname", "getpeername", "getsockopt", "setsockopt",
	// Go's runtime (runtime/sys_linux_*.s, internal/runtime/syscall/linux):
	// its threads,
	"futex", "nanosleep", "sched_yield", "sched_getaffinity", "clone", "gettid", "getpid", "exit", "exit_group",
	// poller,
	"epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2", "pipe2",
	// memory,
	"mmap", "munmap", "mprotect", "madvise", "brk", "prctl",
	// signals,
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "tgkill", "restart_syscall",
	// clock and random numbers.
	"clock_gettime", "getrandom",
}

// refused are those that fail with EACCES, as Landlock would have it: libraries look
// for files that need not be there, at any time (Go for time zones, go-fuse for
// /proc/sys/fs/fuse/max_pages_limit at each INIT).
var refused = []string{"openat"}

// rule forbids a system call of the list with certain arguments. So as to hold no
// more than what Go uses: no memory that can be run, no process but only threads,
// signals to itself, names for memory.
type rule struct {
	name string
	when seccomp.Condition
}

// rules returns those of a process with the given id.
func rules(pid int) []rule {
	return []rule{
		{"mmap", seccomp.Condition{Argument: 2, Operation: seccomp.BitsSet, Value: unix.PROT_EXEC}},
		{"mprotect", seccomp.Condition{Argument: 2, Operation: seccomp.BitsSet, Value: unix.PROT_EXEC}},
		{"clone", seccomp.Condition{Argument: 0, Operation: seccomp.BitsNotSet, Value: unix.CLONE_THREAD}},
		{"tgkill", seccomp.Condition{Argument: 0, Operation: seccomp.NotEqual, Value: uint64(pid)}},
		{"prctl", seccomp.Condition{Argument: 0, Operation: seccomp.NotEqual, Value: unix.PR_SET_VMA}},
	}
}

// policies are what the process must pass, all of them; more is allowed besides. A
// rule has a policy of its own: in one policy, go-seccomp-bpf 1.6.0 compares the
// argument of a rule that did not match with the numbers of the system calls behind it
// (filter.go, Assemble of SyscallWithConditions, does not load the number again). The
// kernel answers calls that are allowed whatever their arguments without running any
// of this.
func policies(pid int, action seccomp.Action, more ...string) []seccomp.Policy {
	var ps []seccomp.Policy
	for _, r := range rules(pid) {
		ps = append(ps, seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{{
			Action:             action,
			NamesWithCondtions: []seccomp.NameWithConditions{{Name: r.name, Conditions: seccomp.ArgumentConditions{r.when}}},
		}}})
	}
	// The last: it forbids to load more.
	last := []seccomp.SyscallGroup{{Action: seccomp.ActionAllow, Names: slices.Concat(allowed, more)}}
	if denied := slices.DeleteFunc(slices.Clone(refused), func(name string) bool { return slices.Contains(more, name) }); len(denied) > 0 {
		last = append(last, seccomp.SyscallGroup{Action: seccomp.ActionErrno | seccomp.Action(unix.EACCES), Names: denied})
	}
	return append(ps, seccomp.Policy{DefaultAction: action, Syscalls: last})
}

// filter allows from now on only what is allowed. Linux 5.7.
func filter(c Config) error {
	action := seccomp.ActionKillProcess
	if c.Trap {
		action = seccomp.ActionTrap
	}
	var more []string
	if c.Files {
		more = fileCalls
	}
	for _, p := range policies(os.Getpid(), action, more...) {
		// Without ESRCH, the library does not see that a thread was left out.
		f := seccomp.Filter{Flag: seccomp.FilterFlagTSync | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH, Policy: p}
		if err := seccomp.LoadFilter(f); err != nil {
			return fmt.Errorf("load (needs Linux 5.7 with CONFIG_SECCOMP_FILTER): %w", err)
		}
	}
	return nil
}
