// Package passthrough serves a directory of the node to a guest, which is hostile,
// for reading and writing: what is mounted below the directory and links from it to
// nowhere else. It is a subtree of package virtiofs, and does what the Rust virtiofsd
// (1.14, src/passthrough) does; what differs is said below.
//
// # What keeps a guest inside
//
// No path of a guest is ever resolved. A request names a node that the guest was
// told, and at most one name, which is checked: no slash, no NUL, not "." or "..".
// A node is an O_PATH descriptor. Looking a name up is one openat2 with
// RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS; making, removing
// and renaming is one *at call on the descriptors of the directories. So whatever the
// node or another guest renames or links meanwhile, the answer is about that
// directory. Symbolic links are read for the guest, never followed. Files and
// directories are opened again from their descriptor; nothing else is opened at all:
// no device, pipe or socket, which guests use as their own. A directory that somebody
// on the node moves out of the tree stays with guests that know it.
//
// The guest's kernel checks permissions, as for a disk of its own. Its root is root
// here: what the directory holds belongs to the guest.
//
// Nodes and handles are bounded by a Budget of descriptors, beyond which requests
// fail with ENFILE. Their numbers are never used again before the FS is closed.
//
// # What the process needs
//
// To change owners, and to make files for others than root: CAP_CHOWN,
// CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_SETUID, CAP_SETGID, CAP_MKNOD,
// CAP_SETFCAP (what virtiofsd keeps). Without, as an ordinary user, files of that
// user can be used by that user and by root of the guest. It needs no CAP_SYS_ADMIN
// and no CAP_DAC_READ_SEARCH.
//
// System calls besides those of the Go runtime: openat, openat2, close, statx,
// fstatfs, readlinkat, getdents64, lseek, preadv2, pwritev2, fallocate,
// copy_file_range, fsync, fdatasync, syncfs, ftruncate, fchmodat, fchownat,
// utimensat, mkdirat, mknodat, symlinkat, linkat, unlinkat, renameat2, fgetxattr,
// fsetxattr, flistxattr, fremovexattr, dup (fcntl F_DUPFD_CLOEXEC), fcntl F_GETFL,
// umask, getrlimit (prlimit64), capget, capset, geteuid, getegid, setfsuid, setfsgid.
//
// The directory /proc/self/fd must be reachable, or opened before it is not
// (Options.Proc). New clears the umask of the process: guests apply their own.
//
// # Differences from virtiofsd
//
// As there: modes of caching and their times, read-only, announced mounts,
// READDIRPLUS, set-user-ID bits are cleared by the guest, or by the node if asked for
// (HANDLE_KILLPRIV_V2, and only then ATOMIC_O_TRUNC, with which Linux would leave the
// bits of a file that is emptied), files are made with the identity of the caller,
// RENAME2 with its flags, FALLOCATE, COPY_FILE_RANGE, LSEEK, SYNCFS,
// devices can be made where the process has CAP_MKNOD and the caller is the guest's
// root, O_DIRECT means nothing for the node's cache, no O_TMPFILE, no locks (those of
// guests are their kernel's, between the processes of one guest), no IOCTL.
//
// Not here: writeback caching, mapping of identities and of extended attributes,
// access control lists and security labels of new files, file handles instead of
// descriptors, migration, supplementary groups of the caller (as there with guests
// before Linux 6.3, files are made with CAP_DAC_OVERRIDE instead). Extended
// attributes are those of files and directories only, and never trusted.*, which are
// the node's own, for instance of overlayfs. A guest's own trusted.* are kept as
// user.virtiofs.trusted.* where Options.Trusted is set, as virtiofsd does with the
// option "--xattrmap=:map:trusted.:user.virtiofs.:"; that it allows none on a link is no
// error to overlayfs (ovl_set_origin_fh in fs/overlayfs/copy_up.c).
//
// Lock order: the locks here are leaves; nothing is called under them.
package passthrough
