package treecmp

import (
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// sum digests a regular file's content.
func (s *snapshot) sum(path string, id inode) ([32]byte, error) {
	if sum, ok := s.sums[id]; ok {
		return sum, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return [32]byte{}, err
	}
	h := sha256.New()
	_, err = io.Copy(h, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return [32]byte{}, err
	}
	sum := [32]byte(h.Sum(nil))
	s.sums[id] = sum
	return sum, nil
}

// readlink asks with a buffer that is longer than any target may be, so that
// one too long is seen and not cut.
func readlink(path string) (string, error) {
	buf := make([]byte, 2*unix.PathMax)
	n, err := unix.Readlink(path, buf)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: path, Err: err}
	}
	return string(buf[:n]), nil
}

// xattrs reads all extended attributes that a user of the tree can see. The
// marks that overlayfs keeps for itself are left out: it hides them in a
// merged tree, but not in a layer's directory.
func xattrs(path string) (map[string]string, error) {
	names, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(path, b) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	var out map[string]string
	for name := range strings.SplitSeq(names, "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		v, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(path, name, b) })
		if err != nil {
			return nil, &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = v
	}
	return out, nil
}

// grow calls get with a small buffer first and with the largest that the
// kernel fills (64 KiB, XATTR_SIZE_MAX and XATTR_LIST_MAX) if need be.
func grow(get func([]byte) (int, error)) (string, error) {
	buf := make([]byte, 512)
	n, err := get(buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10)
		n, err = get(buf)
	}
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}
