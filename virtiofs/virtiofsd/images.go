package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// beneath keeps a name inside the directory, whatever it is or becomes.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// maxFiles bounds the open files of one directory.
const maxFiles = 4096

// guest is who shows files to the guest.
type guest interface {
	// add shows a file, which stays the caller's, with the node id that it has for
	// this guest.
	add(name string, node uint64, f *os.File) error
	remove(name string) error
}

// images keeps what a guest sees like a directory of the node.
type images struct {
	dir   *os.File
	watch *os.File // inotify
	log   *slog.Logger

	mu    sync.Mutex
	out   guest
	files map[string]*imageFile
	last  uint64 // node id given last
}

// imageFile is a regular file, in either process. It is not written any more, or
// without changes that matter.
type imageFile struct {
	f    *os.File
	id   fileID
	node uint64 // given once, to this file only
}

// fileID tells a file from others of the same name: as long as it is open, no other
// one gets its number. A size never changes, so a file that grew is another one.
type fileID struct {
	dev, ino uint64
	size     int64
}

// newImage makes an image of an open file, which must be a regular one.
func newImage(f *os.File) (*imageFile, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	i := &imageFile{f: f}
	if cerr := conn.Control(func(fd uintptr) { i.id, err = identify(int(fd)) }); cerr != nil {
		return nil, cerr
	}
	return i, err
}

// Size implements virtiofs.File.
func (i *imageFile) Size() int64 { return i.id.size }

// Map implements virtiofs.Mapper: everything is there.
func (i *imageFile) Map(off int64) (*os.File, int64, int64, uint64) {
	return i.f, off, i.id.size - off, 0
}

// Valid implements virtiofs.Mapper: files stay as they are.
func (i *imageFile) Valid(int64, uint64) bool { return true }

// ReadAt implements virtiofs.File.
func (i *imageFile) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return i.f.ReadAt(p, off)
}

// openImages opens the directory at path. What lies there is served to the guest of
// showTo, what comes later is found by follow and find.
func openImages(path string, log *slog.Logger) (_ *images, err error) {
	i := &images{log: log, files: map[string]*imageFile{}, last: fuse.FUSE_ROOT_ID}
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
	return i, nil
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

// showTo has a new process show the files, those that the one before showed under
// the same node ids.
func (i *images) showTo(g guest) error {
	i.mu.Lock()
	i.out = g
	for name, f := range i.files {
		if err := g.add(name, f.node, f.f); err != nil {
			i.mu.Unlock()
			return err
		}
	}
	i.mu.Unlock()
	return i.scan()
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
	i.last++
	f.node = i.last
	if err := i.out.add(name, f.node, f.f); err != nil {
		_ = f.f.Close() // only read
		i.log.Warn("file is not served", "file", name, "err", err)
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
	if err := i.out.remove(name); err != nil {
		i.log.Warn("image is gone", "file", name, "err", err)
	}
	_ = f.f.Close() // only read
	i.log.Info("image is gone", "file", name)
}

var errNotServed = errors.New("not a file to serve")

// open opens the file with that name, or returns old if it is still the same.
func (i *images) open(name string, old *imageFile) (*imageFile, error) {
	if name == "" || name[0] == '.' || strings.Contains(name, "/") {
		return nil, errNotServed
	}
	// A device or a pipe must not be opened, so what it is comes first. That is then
	// opened, and not what has the name meanwhile.
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
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", path), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	if id, err = identify(fd); err != nil { // it may have grown
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

// close ends follow and closes all files. No guest may be served any more.
func (i *images) close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, f := range i.files {
		_ = f.f.Close() // only read
	}
	i.files = nil
	var errs []error
	for _, f := range []*os.File{i.watch, i.dir} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
