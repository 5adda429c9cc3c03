package vminit

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const secure = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

type mountPoint struct {
	fstype, source, target string
	flags                  uintptr
	data                   string
}

// mountAll mounts what a Linux system is expected to have. What the kernel or
// Prepare mounted already is left as it is.
func mountAll() error {
	for _, m := range []mountPoint{
		{"proc", "proc", "/proc", secure, ""},
		{"sysfs", "sysfs", "/sys", secure, ""},
		{"devtmpfs", "dev", "/dev", unix.MS_NOSUID, "mode=0755"},
		{"devpts", "devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666"},
		{"tmpfs", "shm", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "run", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "tmp", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", "cgroup2", "/sys/fs/cgroup", secure, ""},
	} {
		if err := mountOne(m); err != nil {
			return err
		}
	}
	return nil
}

func mountOne(m mountPoint) error {
	// 0755 even for /tmp: the mount brings its own mode.
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return err
	}
	err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
	// EBUSY: the same file system is there already.
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
	}
	return nil
}

// leaveInitramfs makes pivot_root possible for container runtimes. The kernel
// refuses it while the root mount has no parent (fs/namespace.c, pivot_root:
// mnt_has_parent), and the initramfs is the one mount that never has one. A
// bind mount of the same file system, moved over it, has: so nothing is copied
// and no memory is taken twice.
func leaveInitramfs() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil {
		return err
	}
	if st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC {
		return nil // a disk or an image is the root: the kernel mounted it over the initramfs
	}
	const dir = "/.root"
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.Mount("/", dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind the initramfs: %w", err)
	}
	if err := os.Chdir(dir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return os.Remove(dir)
}
