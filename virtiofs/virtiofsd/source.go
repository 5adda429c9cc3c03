package virtiofsd

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/virtiofs/nydusapi"
)

// sources opens directories of the node for a child that must not get out of them,
// even if a guest has taken it over. Whoever has a directory can go up from it. So the
// child gets mounts of its own, above which there is nothing.
type sources struct {
	child *process
	// plain: the child has no more rights than the user that this process is of, and
	// this process cannot mount. It gets the directories themselves.
	plain bool
	log   *slog.Logger
}

// open opens the directory of a mount. ErrInvalidArgument when it is none.
func (s *sources) open(k nydusapi.Kind, source string) (*os.File, error) {
	fd, err := unix.Open(source, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOTDIR): // an image of nydus-snapshotter is a file
		return nil, fmt.Errorf("%w: not a directory: images must come from Tatami's snapshotter in mode nydus", errdefs.ErrInvalidArgument)
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, &fs.PathError{Op: "open", Path: source, Err: err})
	case err != nil:
		return nil, &fs.PathError{Op: "open", Path: source, Err: err}
	}
	root := os.NewFile(uintptr(fd), source)
	if s.plain {
		return root, nil
	}
	defer root.Close()
	if k == nydusapi.RAFS {
		return detached(root, 0, unix.MountAttr{Propagation: unix.MS_PRIVATE,
			Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC})
	}
	if alone, err := isPrivate(root); err != nil || alone {
		s.log.Warn("what is mounted in the directory later will not be seen: its mount is private (mount --make-shared)", "dir", source, "err", err)
	}
	// For that, too, the mount must be in the child's namespace.
	f, err := detached(root, unix.AT_RECURSIVE, unix.MountAttr{Propagation: unix.MS_SLAVE, Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV})
	if err != nil {
		return nil, err
	}
	if err := s.child.attach(f); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s for the child: %w", source, err), f.Close())
	}
	return f, nil
}

// detached mounts a directory once more, nowhere (open_tree(2), Linux 5.2;
// mount_setattr(2), Linux 5.12). The mount lasts as long as the file is open.
func detached(root *os.File, recursive uint, a unix.MountAttr) (*os.File, error) {
	fd, err := unix.OpenTree(int(root.Fd()), "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|recursive)
	if err != nil {
		return nil, &fs.PathError{Op: "open_tree", Path: root.Name(), Err: err}
	}
	f := os.NewFile(uintptr(fd), root.Name())
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|recursive, &a); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "mount_setattr", Path: root.Name(), Err: err}, f.Close())
	}
	return f, nil
}

// isPrivate tells whether mounts below a directory stay unknown to other mounts of it:
// its own mount is neither shared nor a slave (the optional fields of
// /proc/self/mountinfo, proc_pid_mountinfo(5)).
func isPrivate(dir *os.File) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return false, fmt.Errorf("mount of %s: %w", dir.Name(), err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	id := strconv.FormatUint(st.Mnt_id, 10)
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) > 6 && fields[0] == id {
			return !strings.HasPrefix(fields[6], "shared:") && !strings.HasPrefix(fields[6], "master:"), nil
		}
	}
	return false, fmt.Errorf("mount %s of %s: %w", id, dir.Name(), errdefs.ErrNotFound)
}

// close ends what open made for a mount beyond its file.
func (s *sources) close(k nydusapi.Kind) error {
	if s.plain || k != nydusapi.Passthrough {
		return nil
	}
	return s.child.detach()
}

// attach puts a mount on the empty root of the child's namespace.
func (p *process) attach(tree *os.File) error {
	return p.inNamespace(func() error {
		return unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
}

// detach takes away what was attached last.
func (p *process) detach() error {
	return p.inNamespace(func() error { return unix.Unmount("/", unix.MNT_DETACH) })
}

// inNamespace does something in a thread that enters the child's mount namespace, and
// ends.
func (p *process) inNamespace(do func() error) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", p.cmd.Process.Pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()             // never unlocked
		err := unix.Unshare(unix.CLONE_FS) // setns(2) wants it
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)
		}
		if err == nil {
			err = do()
		}
		done <- err
	}()
	return <-done
}
