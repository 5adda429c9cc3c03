package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// extractor writes the files of one layer below a directory. Every path is
// looked up inside it as a container would see it (RESOLVE_IN_ROOT): neither
// "..", nor an absolute name, nor a symbolic link of the layer leads out.
type extractor struct {
	leftover
	root int // O_PATH

	// The directory of the entry before: archives go through trees in order.
	parentPath string
	parent     int // -1 is none

	ctx        context.Context // of the unpacking
	buf, zeros []byte          // copyBuffer bytes each
}

type dirTime struct {
	name string
	time [2]unix.Timespec
}

// resolve is how every lookup is confined; magic links lead out by nature.
const resolve = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS

func newExtractor(ctx context.Context, dir string) (*extractor, error) {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	return &extractor{
		leftover: leftover{implicit: make(map[string]struct{})},
		ctx:      ctx, root: root, parent: -1,
	}, nil
}

func (e *extractor) close() {
	e.forgetParent()
	_ = unix.Close(e.root) // an O_PATH descriptor
}

func (e *extractor) forgetParent() {
	if e.parent >= 0 {
		_ = unix.Close(e.parent) // an O_PATH descriptor
	}
	e.parent, e.parentPath = -1, ""
}

// at returns the directory of name, which is made when the archive left it
// out, and the last element of name. The descriptor is good until the next call.
func (e *extractor) at(name string) (parent int, base string, err error) {
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	if e.parent >= 0 && dir == e.parentPath {
		return e.parent, base, nil
	}
	e.forgetParent()
	fd, err := e.openDir(dir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		if err = e.makeParents(dir); err == nil {
			fd, err = e.openDir(dir)
		}
	}
	if err != nil {
		return -1, "", err
	}
	e.parent, e.parentPath = fd, dir
	return fd, base, nil
}

func (e *extractor) openDir(dir string) (int, error) {
	if dir == "" {
		dir = "."
	}
	return unix.Openat2(e.root, dir, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolve})
}

// maxLinks is how many symbolic links one path may go through, as in the
// kernel (include/linux/namei.h, MAXSYMLINKS).
const maxLinks = 40

// makeParents makes the directories of a path that no entry named, also where
// a symbolic link leads to a place that only a lower layer has.
func (e *extractor) makeParents(dir string) error {
	todo := strings.Split(dir, "/")
	at := "" // without symbolic links
	for links := 0; len(todo) > 0; {
		next := todo[0]
		todo = todo[1:]
		switch next {
		case "", ".":
			continue
		case "..":
			at = path.Dir("/" + at)[1:]
			continue
		}
		target, err := e.step(path.Join(at, next))
		if err != nil {
			return err
		}
		if target == "" {
			at = path.Join(at, next)
			continue
		}
		if links++; links > maxLinks {
			return fmt.Errorf("make /%s: %w", dir, unix.ELOOP)
		}
		if strings.HasPrefix(target, "/") {
			at = ""
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return nil
}

// step makes one directory unless it is there; of a symbolic link it returns
// the target. Anything else but a whiteout is an error, as in rootfs/bootstrap.
func (e *extractor) step(name string) (target string, err error) {
	parent, err := e.openDir(path.Dir(name))
	if err != nil {
		return "", err
	}
	defer unix.Close(parent)
	base := path.Base(name)
	var st unix.Stat_t
	err = unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return "", nil
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return readlinkAt(parent, base)
	case err == nil && !isWhiteout(&st):
		return "", fmt.Errorf("make /%s: %w", name, unix.ENOTDIR)
	case err == nil:
		if err := unix.Unlinkat(parent, base, 0); err != nil {
			return "", err
		}
	case !errors.Is(err, unix.ENOENT):
		return "", err
	}
	hidden := err == nil
	e.implicit[name] = struct{}{}
	if err := unix.Mkdirat(parent, base, 0o755); err != nil {
		return "", err
	}
	if hidden {
		return "", setOpaque(parent, base)
	}
	return "", nil
}

func readlinkAt(parent int, base string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(parent, base, buf)
	if err != nil {
		return "", err
	}
	if n == 0 {
		return "", fmt.Errorf("empty symbolic link: %w", errdefs.ErrInvalidArgument)
	}
	return string(buf[:n]), nil
}

// create calls mk, and again after what has the name was removed: of several
// entries with one name the last counts.
func (e *extractor) create(name string, mk func(parent int, base string) error) error {
	parent, base, err := e.at(name)
	if err != nil {
		return err
	}
	err = mk(parent, base)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := removeAll(parent, base); err != nil {
		return err
	}
	e.forgetParent() // it may be what was removed, through a symbolic link
	if parent, base, err = e.at(name); err != nil {
		return err
	}
	return mk(parent, base)
}

// removeAll goes through a descriptor, so that no link on the way is followed.
func removeAll(parent int, base string) error { return os.RemoveAll(procPath(parent, base)) }

// procPath names a file by the descriptor of its directory, for calls that
// take no descriptor.
func procPath(parent int, base string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", parent, base)
}

func (e *extractor) file(name string, hdr *tar.Header, r io.Reader) error {
	var fd, dir int
	var last string
	err := e.create(name, func(parent int, base string) (err error) {
		dir, last = parent, base
		fd, err = unix.Openat(parent, base, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	n, err := e.copySparse(f, r)
	e.size += n
	if err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(setFileAttributes(fd, hdr), f.Close(), setTime(dir, last, timesOf(hdr)))
}

// copySparse writes what is not zero; the rest becomes holes, which take no
// memory. A header of a few bytes can stand for terabytes of zeros, and no byte
// of the blob is read for them: so the context is looked at here as well.
func (e *extractor) copySparse(f *os.File, r io.Reader) (n int64, err error) {
	written := int64(0) // end of the last write
	for {
		if err := context.Cause(e.ctx); err != nil {
			return n, err
		}
		m, err := fillBlock(r, e.buf)
		if m > 0 && !bytes.Equal(e.buf[:m], e.zeros[:m]) {
			if _, err := f.WriteAt(e.buf[:m], n); err != nil {
				return n, err
			}
			written = n + int64(m)
		}
		n += int64(m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return n, err
		}
	}
	if written < n {
		return n, f.Truncate(n)
	}
	return n, nil
}

func (e *extractor) symlink(name string, hdr *tar.Header) error {
	return e.createNode(name, hdr, func(parent int, base string) error {
		return unix.Symlinkat(hdr.Linkname, parent, base)
	})
}

func (e *extractor) node(name string, hdr *tar.Header) error {
	kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[hdr.Typeflag]
	if hdr.Devmajor < 0 || hdr.Devmajor > 0xfff || hdr.Devminor < 0 || hdr.Devminor > 0xfffff {
		return fmt.Errorf("device %d:%d is out of range: %w", hdr.Devmajor, hdr.Devminor, errdefs.ErrInvalidArgument)
	}
	dev := unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	return e.createNode(name, hdr, func(parent int, base string) error {
		return unix.Mknodat(parent, base, kind|0o600, int(dev))
	})
}

func (e *extractor) createNode(name string, hdr *tar.Header, mk func(int, string) error) error {
	if err := e.create(name, mk); err != nil {
		return err
	}
	parent, base, err := e.at(name)
	if err != nil {
		return err
	}
	return setAttributes(parent, base, hdr)
}

// hardlink links to a name of this layer. One that is not here is in a lower
// layer and waits until all are unpacked.
func (e *extractor) hardlink(name, target string) error {
	targetDir, err := e.openDir(path.Dir(target))
	if err == nil {
		defer unix.Close(targetDir)
		var st unix.Stat_t
		err = unix.Fstatat(targetDir, path.Base(target), &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		e.links = append(e.links, link{name, target})
		return nil
	}
	if err != nil {
		return err
	}
	if path.Clean(name) == target {
		return nil
	}
	return e.create(name, func(parent int, base string) error {
		return unix.Linkat(targetDir, path.Base(target), parent, base, 0)
	})
}

func (e *extractor) dir(name string, hdr *tar.Header) error {
	delete(e.implicit, name)
	e.dirs = append(e.dirs, dirTime{name, timesOf(hdr)})
	if name == "" {
		return setAttributes(e.root, ".", hdr)
	}
	parent, base, err := e.at(name)
	if err != nil {
		return err
	}
	err = unix.Mkdirat(parent, base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		err = replaceByDir(parent, base)
	}
	if err != nil {
		return err
	}
	return setAttributes(parent, base, hdr)
}

// replaceByDir makes a directory in the place of anything else. A name that
// was hidden before it was made again shows nothing of the lower layers.
func replaceByDir(parent int, base string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return nil
	}
	if err := unix.Unlinkat(parent, base, 0); err != nil {
		return err
	}
	if err := unix.Mkdirat(parent, base, 0o700); err != nil {
		return err
	}
	if isWhiteout(&st) {
		return setOpaque(parent, base)
	}
	return nil
}

// whiteout hides a name of the lower layers, or all names in dir, in the way
// of overlay (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque
// directories"). What this layer itself brings stays, whatever the order.
func (e *extractor) whiteout(dir, hidden string) error {
	if hidden == ".wh..opq" {
		parent, base, err := e.atDir(dir)
		if err != nil {
			return err
		}
		return setOpaque(parent, base)
	}
	if strings.HasPrefix(hidden, whiteoutPrefix) {
		return nil // AUFS's own records
	}
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("a whiteout hides %q: %w", hidden, errdefs.ErrInvalidArgument)
	}
	parent, base, err := e.at(path.Join(dir, hidden))
	if err != nil {
		return err
	}
	e.whiteouts = append(e.whiteouts, path.Join(dir, hidden))
	err = unix.Mknodat(parent, base, unix.S_IFCHR, 0)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return setOpaque(parent, base)
	}
	return nil
}

// atDir is at for a directory that must exist itself.
func (e *extractor) atDir(dir string) (parent int, base string, err error) {
	parent, _, err = e.at(path.Join(dir, "x"))
	return parent, ".", err
}

func isWhiteout(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 }

// opaqueXattr marks a directory that hides those of the lower layers.
const opaqueXattr = overlayXattr + "opaque"

func setOpaque(parent int, base string) error {
	return unix.Lsetxattr(procPath(parent, base), opaqueXattr, []byte("y"), 0)
}

// setDirTimes comes last: making files changes the time of their directory.
func (l *leftover) setDirTimes(layer string) error {
	e, err := newExtractor(context.Background(), layer) // copies nothing
	if err != nil {
		return err
	}
	defer e.close()
	for _, d := range l.dirs {
		if err := e.setDirTime(d); err != nil {
			return fmt.Errorf("/%s: %w", d.name, err)
		}
	}
	return nil
}

// setDirTime passes over what is no directory any more: a later entry may have
// taken its place.
func (e *extractor) setDirTime(d dirTime) error {
	if d.name == "" {
		return setTime(e.root, ".", d.time)
	}
	parent, err := e.openDir(path.Dir(d.name))
	if err == nil {
		defer unix.Close(parent)
		var st unix.Stat_t
		err = unix.Fstatat(parent, path.Base(d.name), &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return setTime(parent, path.Base(d.name), d.time)
		}
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}
