package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// mountTop puts what the container sees at rec.Target and notes its identity.
func (m *Mounter) mountTop(ctx context.Context, lw *lower, rec *Record) error {
	if rec.MadeTarget {
		if err := os.Mkdir(rec.Target, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make target: %w", err)
		}
	}
	dir := m.table.lower(lw.rec.Manifest)
	var err error
	if rec.ReadOnly {
		err = thread.Isolated(func() error { return bind(dir, rec.Target) })
	} else {
		err = m.mountOverlay(ctx, dir, rec)
	}
	if err != nil {
		return err
	}
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	i := mounts[rec.Target]
	if i == nil {
		return fmt.Errorf("target is no mount point after mounting: %w", errdefs.ErrInternal)
	}
	rec.MountID, rec.Device = i.ID, deviceOf(i)
	return nil
}

// bind shows a directory's mount at a second place. It is read-only as the
// first one is.
func bind(dir, target string) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone mount %s: %w", dir, err)
	}
	return place(fd, target)
}

// mountOverlay mounts lower with an upper directory of its own. All three
// paths lie in the state directory and need no escaping.
func (m *Mounter) mountOverlay(ctx context.Context, lowerDir string, rec *Record) error {
	base := m.table.upper(rec.ID)
	upper, work := filepath.Join(base, "upper"), filepath.Join(base, "work")
	if err := prepareUpper(base, rec); err != nil {
		return err
	}
	fresh, err := makeUpper(upper, work)
	if err != nil {
		return err
	}
	err = placed(ctx, rec.Target, func() (int, error) { return newOverlay(ctx, lowerDir, upper, work, fresh) })
	if err != nil && fresh {
		_ = os.Remove(upper) // else it would be taken for one with the attributes that it needs
	}
	return err
}

// newOverlay makes an overlay, mounted nowhere yet, which reads the image. The merged
// root has the attributes of upper, so a fresh one gets those of the image's root.
// Precondition: the thread is isolated.
func newOverlay(ctx context.Context, lowerDir, upper, work string, fresh bool) (int, error) {
	if fresh {
		if err := copyAttributes(lowerDir, upper); err != nil {
			return -1, fmt.Errorf("copy attributes of the image's root directory: %w", err)
		}
	}
	if err := context.Cause(ctx); err != nil { // another mount may have the directories
		return -1, err
	}
	fd, err := newMount("overlay", 0,
		setting("source", "overlay"),
		setting("lowerdir", lowerDir), setting("upperdir", upper), setting("workdir", work),
		// With an index an upper directory could never be used with another
		// lower; containers do not need what it is for (NFS export).
		setting("index", "off"),
	)
	if err != nil {
		return -1, fmt.Errorf("mount overlay: %w", err)
	}
	return fd, nil
}

// prepareUpper makes base a directory that overlay can write to: a new tmpfs,
// or a link to the given directory.
func prepareUpper(base string, rec *Record) error {
	if rec.Upper != "" {
		if err := checkUpper(rec.Upper); err != nil {
			return err
		}
		if err := os.Symlink(rec.Upper, base); err != nil {
			return fmt.Errorf("link upper directory: %w", err)
		}
		return nil
	}
	if err := os.Mkdir(base, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make upper directory: %w", err)
	}
	return thread.Isolated(func() error {
		fd, err := newMount("tmpfs", 0, setting("source", "tatami-upper"), setting("mode", "0755"))
		if err != nil {
			return fmt.Errorf("mount tmpfs for the upper directory: %w", err)
		}
		return place(fd, base)
	})
}

// checkUpper refuses what the kernel would refuse with no more than EINVAL.
func checkUpper(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make upper directory: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("upper directory %s: %w", dir, err)
	}
	if st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return fmt.Errorf("upper directory %s is itself on an overlay, which cannot hold one; give a directory on ext4, xfs or tmpfs, or none for a tmpfs: %w",
			dir, errdefs.ErrFailedPrecondition)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("upper directory %s is on a read-only filesystem; give a writable one, or none for a tmpfs: %w",
			dir, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// makeUpper makes the two directories of an overlay, and says whether upper was not
// there before.
func makeUpper(upper, work string) (fresh bool, err error) {
	if err := os.Mkdir(work, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return false, fmt.Errorf("make overlay work directory: %w", err)
	}
	err = os.Mkdir(upper, 0o755)
	if errors.Is(err, os.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("make overlay upper directory: %w", err)
	}
	return true, nil
}

func copyAttributes(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return err
	}
	if err := unix.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, to, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// copyXattrs leaves out what the upper filesystem cannot store: an old tmpfs
// knows no user attributes.
func copyXattrs(from, to string) error {
	names := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(from, names)
	if err != nil {
		if err == unix.ENOTSUP {
			return nil
		}
		return err
	}
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		k, err := unix.Lgetxattr(from, name, value)
		if err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
		if err := unix.Lsetxattr(to, name, value[:k], 0); err != nil && err != unix.ENOTSUP {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
	}
	return nil
}

// removeTop undoes mountTop, and what a part of it did. ours says that a mount
// at the target can only be this one.
func (m *Mounter) removeTop(rec *Record, ours bool) error {
	var errs error
	if ours {
		errs = detach(rec.Target)
	}
	base := m.table.upper(rec.ID)
	if rec.Upper == "" {
		errs = errors.Join(errs, detach(base))
	}
	if err := os.Remove(base); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = errors.Join(errs, fmt.Errorf("remove upper directory: %w", err))
	}
	if rec.MadeTarget && ours {
		// Not ours to empty: a directory in use stays.
		_ = os.Remove(rec.Target)
	}
	return errs
}
