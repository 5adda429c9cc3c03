package confine

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// enterRoot leaves the process with an empty directory as its root, as far as the
// sandbox says.
func enterRoot(c Config) error {
	switch c.Sandbox {
	case Namespace:
		return pivotToNothing()
	case Chroot:
		if err := unix.Chroot(c.Empty); err != nil {
			return fmt.Errorf("change root: %w", err)
		}
		return unix.Chdir("/")
	case None:
		return unix.Chdir("/")
	}
	return fmt.Errorf("no such sandbox")
}

// pivotToNothing makes an empty read-only file system the root of this mount
// namespace, which is the process's own. Nothing else is left mounted in it.
func pivotToNothing() error {
	// Nothing that follows may reach the namespace that this one was copied from.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// On a directory that is there everywhere: this program was started through it.
	const place = "/proc"
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("nothing", place, "tmpfs", flags, "size=4k,nr_inodes=2,mode=555"); err != nil {
		return fmt.Errorf("mount an empty directory: %w", err)
	}
	if err := unix.Chdir(place); err != nil {
		return fmt.Errorf("enter the empty directory: %w", err)
	}
	// The old root comes to lie over the new one (pivot_root(2), "pivot_root(".", ".")").
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	return unix.Chdir("/")
}
