package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/virtiofs"
	"golang.org/x/sys/unix"
)

// beneath keeps a name inside the directory, whatever it is or becomes.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// maxFiles bounds the open files of one directory.
const maxFiles = 4096

// images keeps a virtiofs.Directory like a directory of the node.
type images struct {
	dir   *os.File
	watch *os.File // inotify
	out   *virtiofs.Directory
	log   *slog.Logger

	mu    sync.Mutex
	files map[string]*imageFile
}

// imageFile is a regular file as virtiofs.File. It is not written any more, or
// without changes that matter.
type imageFile struct {
	f  *os.File
	id fileID
}

// fileID tells a file from others of the same name: as long as it is open, no other
// one gets its number. A size never changes, so a file that grew is another one.
type fileID struct {
	dev, ino uint64
	size     int64
}

func (i *imageFile) Size() int64 { return i.id.size }

// Map implements virtiofs.Mapper: everything is there.
func (i *imageFile) Map(off int64) (*os.File, int64, int64) { return i.f, off, i.id.size - off }

func (i *imageFile) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return i.f.ReadAt(p, off)
}

// openImages serves what lies in the directory at path and what comes later.
func openImages(path string, log *slog.Logger) (_ *images, err error) {
	i := &images{out: virtiofs.NewDirectory(), log: log, files: map[string]*imageFile{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open shared directory: %w", err), i.close())
		}
	}()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	i.dir = os.NewFile(uintptr(fd), path)
	if fd, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	i.watch = os.NewFile(uintptr(fd), "inotify")
	// By the descriptor: the path may lead elsewhere meanwhile.
	here := fmt.Sprintf("/proc/self/fd/%d", i.dir.Fd())
	const events = unix.IN_CREATE | unix.IN_CLOSE_WRITE | unix.IN_MOVE | unix.IN_DELETE | unix.IN_ONLYDIR
	if _, err := unix.InotifyAddWatch(fd, here, events); err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	i.out.Find = i.find
	return i, i.scan()
}

// follow keeps up with the directory until close.
func (i *images) follow() {
	buf := make([]byte, 64<<10)
	for {
		// What has happened does not matter: the directory says how it is now.
		if _, err := i.watch.Read(buf); err != nil {
			return
		}
		if err := i.scan(); err != nil {
			i.log.Error("shared directory", "err", err)
		}
	}
}

// scan makes the served files those of the directory.
func (i *images) scan() error {
	names, err := i.names()
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	for name := range i.files {
		if _, there := slices.BinarySearch(names, name); !there {
			i.drop(name)
		}
	}
	for _, name := range names {
		i.update(name)
	}
	return nil
}

// names lists the directory in order.
func (i *images) names() ([]string, error) {
	fd, err := unix.Openat(int(i.dir.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", i.dir.Name(), err)
	}
	d := os.NewFile(uintptr(fd), i.dir.Name())
	defer d.Close()
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func (i *images) find(name string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.update(name)
}

// update serves the file that now has the name, if it is one to serve.
// Precondition: mu is held.
func (i *images) update(name string) {
	old := i.files[name]
	f, err := i.open(name, old)
	switch {
	case err == nil && f == old:
		return
	case err != nil:
		i.drop(name)
		if !errors.Is(err, errNotServed) && !errors.Is(err, unix.ENOENT) {
			i.log.Warn("file is not served", "file", name, "err", err)
		}
		return
	}
	i.drop(name)
	if err := i.out.Add(name, f); err != nil {
		_ = f.f.Close() // only read
		return
	}
	i.files[name] = f
	i.log.Info("serve image", "file", name, "size", f.Size())
}

// drop stops serving a file. Precondition: mu is held.
func (i *images) drop(name string) {
	f := i.files[name]
	if f == nil {
		return
	}
	delete(i.files, name)
	i.out.Remove(name)
	_ = f.f.Close() // only read
	i.log.Info("image is gone", "file", name)
}

var errNotServed = errors.New("not a file to serve")

// open opens the file with that name, or returns old if it is still the same.
func (i *images) open(name string, old *imageFile) (*imageFile, error) {
	if name == "" || name[0] == '.' {
		return nil, errNotServed
	}
	// A device or a pipe must not be opened, so what it is comes first.
	path, err := openat2(i.dir, name, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer unix.Close(path)
	id, err := identify(path)
	if err != nil {
		return nil, err
	}
	if old != nil && old.id == id {
		return old, nil
	}
	if len(i.files) >= maxFiles {
		return nil, fmt.Errorf("%w: %d files are open already", errdefs.ErrResourceExhausted, maxFiles)
	}
	fd, err := openat2(i.dir, name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	if id, err = identify(fd); err != nil { // another one may have come between
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &imageFile{f: os.NewFile(uintptr(fd), name), id: id}, nil
}

func openat2(dir *os.File, name string, flags uint64) (int, error) {
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: beneath})
	if errors.Is(err, unix.ELOOP) {
		return -1, errNotServed // a symbolic link
	}
	if err != nil {
		return -1, &fs.PathError{Op: "openat2", Path: name, Err: err}
	}
	return fd, nil
}

func identify(fd int) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileID{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fileID{}, errNotServed
	}
	return fileID{dev: st.Dev, ino: st.Ino, size: st.Size}, nil
}

// close ends follow and closes all files. Nothing may be served any more.
func (i *images) close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	for name := range i.files {
		i.drop(name)
	}
	var errs []error
	for _, f := range []*os.File{i.watch, i.dir} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
