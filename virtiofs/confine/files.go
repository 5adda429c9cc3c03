package confine

import "golang.org/x/sys/unix"

// fileCalls are the system calls besides of a process that uses files below
// directories which it was given (package virtiofs/passthrough). They name files by a
// descriptor and one name; all other paths end in an empty directory.
var fileCalls = []string{
	"openat", "openat2", "statx", "fstatfs", "readlinkat", "getdents64", "lseek", "pwrite64", "pwritev2",
	"fallocate", "copy_file_range", "fsync", "fdatasync", "syncfs", "ftruncate", "fchmodat", "fchmodat2", "fchownat", "utimensat",
	"mkdirat", "mknodat", "symlinkat", "linkat", "unlinkat", "renameat2",
	"fgetxattr", "fsetxattr", "flistxattr", "fremovexattr",
	// Of threads that make files for the guest's users.
	"umask", "geteuid", "getegid", "capget", "capset", "setfsuid", "setfsgid",
}

// fileCapabilities are what it takes to make files of others, and to change all that
// is to be changed of them: those that virtiofsd keeps (its src/sandbox.rs), without
// any that concerns anything but files.
var fileCapabilities = []uint{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID,
	unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_MKNOD, unix.CAP_SETFCAP,
}

// capabilities are those that the process keeps, as bits.
func (c Config) capabilities() (bits uint64) {
	if c.Files {
		for _, n := range fileCapabilities {
			bits |= 1 << n
		}
	}
	return bits
}
