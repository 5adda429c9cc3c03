package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/snapshotter"
	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// maxLook bounds a file in bytes; a larger one is left out.
const maxLook = 1 << 20

// Look implements snapshotter.Images. The reads are answered by this process, so
// they are made on a thread of their own: see package thread.
func (m *Mounts) Look(ctx context.Context, dir string, files ...string) (snapshotter.Tree, error) {
	type result struct {
		tree snapshotter.Tree
		err  error
	}
	done := make(chan result, 1)
	go func() { // ends when the reads do, which the store bounds
		var r result
		r.err = thread.Isolated(func() error { return look(dir, files, &r.tree) })
		done <- r
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return r.tree, fmt.Errorf("read image at %s: %w: %w", dir, r.err, errdefs.ErrUnavailable)
		}
		return r.tree, nil
	case <-ctx.Done():
		return snapshotter.Tree{}, fmt.Errorf("read image at %s: %w", dir, context.Cause(ctx))
	}
}

func look(dir string, files []string, t *snapshotter.Tree) error {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(root) }()
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return err
	}
	t.UID, t.GID, t.Mode = int(st.Uid), int(st.Gid), fileMode(st.Mode)
	t.Files = map[string][]byte{}
	for _, name := range files {
		content, err := readBeneath(root, name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if content != nil {
			t.Files[name] = content
		}
	}
	return nil
}

// readBeneath reads a regular file of an image, in which symbolic links are
// followed as in a container. What is no such file, or too large, is nil, and is
// not opened: opening a device is enough for some to act.
func readBeneath(root int, name string) ([]byte, error) {
	path, err := find(root, name)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG):
		return nil, nil
	case err != nil:
		return nil, err
	}
	defer func() { _ = unix.Close(path) }()
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxLook {
		return nil, err
	}
	// Not /proc/self: this thread has descriptors of its own.
	fd, err := unix.Open(fmt.Sprintf("/proc/thread-self/fd/%d", path), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	content := make([]byte, 0, st.Size)
	for {
		n, err := unix.Read(fd, content[len(content):cap(content)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, err
		case n == 0:
			return content, nil
		default:
			content = content[:len(content)+n]
		}
	}
}

// find opens the path of a file beneath root. The kernel gives up a path with
// ".." in it when anything on the machine is renamed or mounted meanwhile
// (EAGAIN, openat2(2)).
func find(root int, name string) (path int, err error) {
	for range 100 {
		path, err = unix.Openat2(root, name, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
		})
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return path, err
}

// fileMode is the mode of a directory as package os has it.
func fileMode(mode uint32) os.FileMode {
	m := os.ModeDir | os.FileMode(mode&0o777)
	for bit, flag := range map[uint32]os.FileMode{unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}
