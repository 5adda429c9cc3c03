package torture

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// create makes what the header says at a free name or, for a directory, at one
// that is a directory already.
func (u *unpacker) create(name string, h *tar.Header, content io.Reader) error {
	p := u.at(name)
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		if err = os.Mkdir(p, 0o755); errors.Is(err, fs.ErrExist) {
			err = clearXattrs(p)
		}
		u.dirs[name] = h
		delete(u.implied, name)
	case tar.TypeReg:
		err = writeFile(p, content)
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, p)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		err = unix.Mknod(p, kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	default:
		err = fmt.Errorf("type %q", h.Typeflag)
	}
	if err != nil {
		return err
	}
	return describe(p, h)
}

func writeFile(p string, content io.Reader) error {
	f, err := os.Create(p)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	return errors.Join(err, f.Close())
}

// describe sets all attributes.
func describe(p string, h *tar.Header) error {
	if err := os.Lchown(p, h.Uid, h.Gid); err != nil {
		return err
	}
	for name, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(name, "SCHILY.xattr.")
		if !ok || strings.HasPrefix(name, "trusted.") {
			continue
		}
		err := unix.Lsetxattr(p, name, []byte(value), 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := unix.Chmod(p, uint32(h.Mode&0o7777)); err != nil {
			return err
		}
	}
	return setTime(p, h.ModTime.Unix(), int64(h.ModTime.Nanosecond()))
}

func setTime(p string, sec, nsec int64) error {
	ts := unix.Timespec{Sec: sec, Nsec: nsec}
	return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// clearXattrs takes away what an earlier entry for the directory has set.
func clearXattrs(p string) error {
	return eachXattr(p, func(name, _ string) error {
		if strings.HasPrefix(name, "trusted.overlay.") {
			return nil
		}
		return unix.Lremovexattr(p, name)
	})
}

func eachXattr(p string, do func(name, value string) error) error {
	buf, value := make([]byte, 1<<16), make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		return err
	}
	for _, name := range strings.Split(string(buf[:n]), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			return err
		}
		if err := do(name, string(value[:n])); err != nil {
			return err
		}
	}
	return nil
}

// link makes a hard link: within the layer if the target is there, else in the
// layer mounted over those below.
func (u *unpacker) link(name, target string) (err error) {
	if err := u.remove(name); err != nil {
		return err
	}
	dir, base := path.Split(target)
	dir, err = resolve(u.root, dir)
	if err != nil {
		return err
	}
	own := u.at(path.Join(dir, base))
	if fi, err := os.Lstat(own); err == nil && !isWhiteout(fi) && !fi.IsDir() {
		return os.Link(own, u.at(name))
	}
	if u.lower == "" {
		return fs.ErrNotExist
	}
	if err := mountUpper(u.merged, u.below, u.root, u.work); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(u.merged, 0)) }()
	if err := os.RemoveAll(filepath.Join(u.merged, name)); err != nil {
		return err
	}
	dir, base = path.Split(target)
	if dir, err = resolve(u.merged, dir); err != nil {
		return err
	}
	return os.Link(filepath.Join(u.merged, dir, base), filepath.Join(u.merged, name))
}

// finish makes removed directories opaque, gives implied ones their attributes
// and all directories their times.
func (u *unpacker) finish() error {
	for p := range u.cut {
		if fi, err := os.Lstat(u.at(p)); err == nil && fi.IsDir() {
			if err := unix.Setxattr(u.at(p), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
				return err
			}
		}
	}
	for p := range u.cut {
		if fi, err := os.Lstat(u.at(p)); err == nil && isWhiteout(fi) && !u.covers(p) {
			if err := os.Remove(u.at(p)); err != nil {
				return err
			}
		}
	}
	if u.dirs[""] == nil {
		u.implied[""] = true
	}
	for _, p := range slices.Sorted(maps.Keys(u.implied)) {
		if err := u.inherit(p); err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
	}
	for p, h := range u.dirs {
		if err := describe(u.at(p), h); err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
	}
	return nil
}

// inherit copies the attributes of the lower directory that p leads to.
func (u *unpacker) inherit(p string) error {
	from := ""
	if u.lower != "" && !u.removed(p) {
		if at, err := resolve(u.lower, p); err == nil {
			from = filepath.Join(u.lower, at)
		}
	}
	var st unix.Stat_t
	if from == "" || unix.Lstat(from, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		// mkdir below a set-group-id directory takes its group and the bit.
		if err := errors.Join(os.Lchown(u.at(p), 0, 0), unix.Chmod(u.at(p), 0o755)); err != nil {
			return err
		}
		return setTime(u.at(p), 0, 0)
	}
	if err := os.Lchown(u.at(p), int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	err := eachXattr(from, func(name, value string) error {
		if strings.HasPrefix(name, "trusted.") {
			return nil
		}
		return unix.Lsetxattr(u.at(p), name, []byte(value), 0)
	})
	if err != nil {
		return err
	}
	if err := unix.Chmod(u.at(p), st.Mode&0o7777); err != nil {
		return err
	}
	return setTime(u.at(p), st.Mtim.Sec, st.Mtim.Nsec)
}

// covers says whether there is something below p for a whiteout to hide. Where
// there is not, overlayfs would show the whiteout's name in the listing of a
// directory that it has no other layer for.
func (u *unpacker) covers(p string) bool {
	if u.lower == "" {
		return false
	}
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		var opaque [1]byte
		n, err := unix.Lgetxattr(u.at(dir), "trusted.overlay.opaque", opaque[:])
		fi, err2 := os.Lstat(filepath.Join(u.lower, dir))
		if err == nil && n == 1 && opaque[0] == 'y' || err2 != nil || !fi.IsDir() {
			return false
		}
	}
	_, err := os.Lstat(filepath.Join(u.lower, p))
	return err == nil
}

// removed says whether the layer has a whiteout for p or a parent of it.
func (u *unpacker) removed(p string) bool {
	for ; p != "." && p != ""; p = path.Dir(p) {
		if u.cut[p] {
			return true
		}
	}
	return false
}

// resolve follows all symlinks in a path, without leaving root, and takes what
// does not exist as it is.
func resolve(root, name string) (string, error) {
	done, todo := "", strings.Split(name, "/")
	for links := 0; len(todo) > 0; {
		next := todo[0]
		todo = todo[1:]
		switch next {
		case "", ".":
			continue
		case "..":
			done = clean(path.Dir("/" + done))
			continue
		}
		target, err := os.Readlink(filepath.Join(root, done, next))
		if err != nil {
			done = path.Join(done, next)
			continue
		}
		if links++; links > 255 {
			return "", unix.ELOOP
		}
		if path.IsAbs(target) {
			done = ""
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return done, nil
}
