package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/nydusapi"
	"github.com/tatami-containers/tatami/virtiofs/passthrough"
)

// treeOptions say how directories are shown.
type treeOptions struct {
	Cache  passthrough.Cache
	Files  FileOptions
	Nydus  bool // by requests
	Images bool // there are images besides
}

// trees are the directories that a child shows: the part with the guest.
type trees struct {
	o      treeOptions
	tree   *virtiofs.Tree
	budget *passthrough.Budget
	proc   *os.File // /proc/self/fd
	log    *slog.Logger

	mu  sync.Mutex
	all map[string]*passthrough.FS // by the path where they are shown
}

var _ shower = (*trees)(nil)

// newTrees shows none but images, if there are any. It opens what cannot be opened by
// a confined process.
func newTrees(o treeOptions, images *virtiofs.Directory, log *slog.Logger) (*trees, error) {
	t := &trees{o: o, log: log, tree: virtiofs.NewTree(), all: map[string]*passthrough.FS{}}
	if o.Images {
		if err := t.tree.Mount("/"+sharedimages.Dir, images); err != nil {
			return nil, err
		}
	}
	var others int64
	if o.Images {
		others = descriptors()
	}
	var err error
	if t.budget, err = passthrough.DefaultBudget(others); err != nil {
		return nil, err
	}
	if t.proc, err = ownDescriptors(); err != nil {
		return nil, err
	}
	return t, nil
}

// ownDescriptors opens /proc/self/fd, as a mount of its own: from the directory itself
// a guest that has taken over this process could go up, to the node's settings in
// /proc/sys, which belong to root, and to the files of other processes.
func ownDescriptors() (*os.File, error) {
	const path = "/proc/self/fd"
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	proc := os.NewFile(uintptr(fd), path)
	own, err := detached(proc, 0, unix.MountAttr{Propagation: unix.MS_PRIVATE,
		Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC})
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 { // sandbox none of an ordinary user, whose walls these are not
		return proc, nil
	}
	return own, errors.Join(err, proc.Close())
}

// configure makes a device show them.
func (t *trees) configure(c *virtiofs.Config) {
	c.Tree, c.XAttr, c.KillPriv = t.tree, t.o.Files.XAttr, t.o.Files.KillPriv
}

// show implements shower.
func (t *trees) show(_ context.Context, at string, k nydusapi.Kind, root *os.File) error {
	o := passthrough.Options{XAttr: t.o.Files.XAttr, Budget: t.budget, Proc: t.proc, Log: t.log}
	switch k {
	case nydusapi.RAFS: // an image never changes
		o.ReadOnly, o.Cache = true, passthrough.CacheAlways
	case nydusapi.Passthrough:
		o.ReadOnly, o.Cache, o.AnnounceSubmounts = t.o.Files.ReadOnly, t.o.Cache, !t.o.Files.NoSubmounts
		o.Trusted = t.o.Nydus // containers' upper directories are in it
	default:
		return fmt.Errorf("show %s: %w: there is no kind %q", at, errdefs.ErrInvalidArgument, k)
	}
	f, err := passthrough.New(root, o)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.tree.Mount(at, f); err != nil {
		return errors.Join(err, f.Close())
	}
	t.all[at] = f
	return nil
}

// hide implements shower. The directory is not in use any more when it returns.
func (t *trees) hide(_ context.Context, at string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.tree.Unmount(at); err != nil {
		return err
	}
	f := t.all[at]
	delete(t.all, at)
	return f.Close()
}
