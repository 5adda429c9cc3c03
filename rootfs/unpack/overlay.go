package unpack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Overlay puts the n layers that Image unpacked below image together at target, the highest on top,
// below the writable directory upper; without one the mount is read-only.
func Overlay(image string, n int, upper, target string) error {
	if n == 0 {
		return fmt.Errorf("mount overlay at %s: the image has no layers: %w", target, errdefs.ErrInvalidArgument)
	}
	var lower []string
	for i := n - 1; i >= 0; i-- {
		lower = append(lower, strconv.Itoa(i))
	}
	options := ""
	flags := uintptr(0)
	if upper == "" {
		// Without an upper directory overlay wants two lower ones.
		lower = append(lower, emptyLayer)
		flags = unix.MS_RDONLY
	} else {
		up, work := filepath.Join(upper, "upper"), filepath.Join(upper, "work")
		if err := makeUpper(up, work, filepath.Join(image, lower[0])); err != nil {
			return err
		}
		options = ",upperdir=" + escape(up) + ",workdir=" + escape(work)
	}
	options = "lowerdir=" + strings.Join(lower, ":") + options
	if err := os.MkdirAll(target, 0o755); err != nil { //nolint:gosec // the root directory of a container
		return err
	}
	err := within(image, func() error { return unix.Mount("overlay", target, "overlay", flags, options) })
	if err != nil {
		return fmt.Errorf("mount overlay of %d layers at %s: %w", n, target, err)
	}
	return nil
}

// makeUpper makes the writable directory, whose own attributes are what a
// container sees of its root, after the highest layer.
func makeUpper(up, work, top string) error {
	if err := os.MkdirAll(work, 0o755); err != nil { //nolint:gosec // overlay makes it private
		return err
	}
	err := os.Mkdir(up, 0o755) //nolint:gosec // the root directory of a container
	if errors.Is(err, fs.ErrExist) {
		return nil // from an earlier container, which may have changed it
	}
	if err != nil {
		return err
	}
	root, err := lookUp(top, "")
	if err != nil {
		return err
	}
	defer root.close()
	return copyAttributes(root, up)
}

// emptyLayer is a directory without files beside the layers of each image.
const emptyLayer = "empty"

// escape protects what means something in overlay's options
// (Documentation/filesystems/overlayfs.rst, "Multiple lower layers").
func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, ",", `\,`, ":", `\:`).Replace(path)
}

// within runs f with dir as its working directory, so that layers have short
// names: mount(2) takes one page of options, and images up to 127 layers.
func within(dir string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end. While it is held here, another is used.
			defer runtime.UnlockOSThread()
			result <- within(dir, f)
			return
		}
		// Never unlocked: the thread gets a working directory of its own and
		// ends with the goroutine.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			result <- fmt.Errorf("separate the working directory: %w", err)
			return
		}
		if err := unix.Chdir(dir); err != nil {
			result <- fmt.Errorf("enter %s: %w", dir, err)
			return
		}
		result <- f()
	}()
	return <-result
}

// isMountPoint tells whether a file system is mounted right at path.
func isMountPoint(path string) bool {
	var st unix.Statx_t
	// Without AT_STATX_DONT_SYNC a network file system might be asked.
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
