package export

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// seal opens a file again, read-only, through a mount of its own that is read-only
// (open_tree(2), Linux 5.2; mount_setattr(2), Linux 5.12). It takes f over. A device
// that has directories of its guest, too, can open what it was given once more, by
// /proc/self/fd, and it is root: of the file itself it could so get a descriptor that
// writes to the node's store, and to the images of all.
func seal(f *os.File) (*os.File, error) {
	sealed, err := again(f)
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 { // so is no device root
		return f, nil
	}
	if err != nil {
		err = fmt.Errorf("make %s read-only for a device (CAP_SYS_ADMIN is needed): %w", f.Name(), err)
	}
	return sealed, errors.Join(err, f.Close())
}

// again does seal's work.
func again(f *os.File) (*os.File, error) {
	tree, err := unix.OpenTree(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: f.Name(), Err: err}
	}
	defer unix.Close(tree)
	a := unix.MountAttr{Propagation: unix.MS_PRIVATE,
		Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &a); err != nil {
		return nil, &os.PathError{Op: "mount_setattr", Path: f.Name(), Err: err}
	}
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", tree))
}
