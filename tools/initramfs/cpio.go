package initramfs

import (
	"fmt"
	"io"
	"math"
	"path"
)

// File types and permissions as cpio has them (those of stat.h).
const (
	typeDir     = 0o040000
	typeFile    = 0o100000
	typeSymlink = 0o120000
)

// writer writes a newc archive (Linux, Documentation/driver-api/early-userspace/
// buffer-format.rst). Times and owners are 0 and inodes count up, so that equal
// input gives equal bytes. Parent directories are added by themselves. The first
// error stays.
type writer struct {
	w    io.Writer
	off  int64 // bytes written
	ino  uint32
	dirs map[string]bool
	err  error
}

func newWriter(w io.Writer) *writer {
	return &writer{w: w, dirs: map[string]bool{".": true}}
}

// dir adds a directory and its parents, once.
func (w *writer) dir(name string) {
	name = clean(name)
	if w.dirs[name] {
		return
	}
	w.dirs[name] = true
	w.dir(path.Dir(name))
	w.header(name, typeDir|0o755, 0)
}

// file adds a regular file of exactly size bytes from r.
func (w *writer) file(name string, perm uint32, size int64, r io.Reader) {
	w.dir(path.Dir(clean(name)))
	if size > math.MaxUint32 && w.err == nil {
		w.err = fmt.Errorf("%s: a cpio archive cannot hold %d bytes", name, size)
	}
	w.header(clean(name), typeFile|perm, size)
	if w.err != nil {
		return
	}
	n, err := io.CopyN(w.w, r, size)
	w.off += n
	if err != nil {
		w.err = fmt.Errorf("%s: %w", name, err)
	}
	w.pad()
}

func (w *writer) symlink(name, target string) {
	w.dir(path.Dir(clean(name)))
	w.header(clean(name), typeSymlink|0o777, int64(len(target)))
	w.write(target)
	w.pad()
}

func (w *writer) close() error {
	w.ino = 0
	w.header("TRAILER!!!", 0, 0)
	return w.err
}

func (w *writer) header(name string, mode uint32, size int64) {
	w.ino++
	// magic, ino, mode, uid, gid, nlink, mtime, size, device, rdevice, length of
	// the name with its zero, checksum
	w.write(fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		w.ino, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name))
	w.pad()
}

func (w *writer) write(s string) {
	if w.err != nil {
		return
	}
	n, err := io.WriteString(w.w, s)
	w.off += int64(n)
	w.err = err
}

func (w *writer) pad() { w.write("\x00\x00\x00"[:-w.off&3]) }

// clean makes a name relative to the root, which is ".".
func clean(name string) string {
	if name = path.Clean("/" + name); name == "/" {
		return "."
	}
	return name[1:]
}
