package posix

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// testRefusals tries everything that would change the tree.
func testRefusals(t *testing.T, dir string) {
	file, fresh := filepath.Join(dir, "file"), filepath.Join(dir, "new")
	opened := func(path string, flags int) error {
		fd, err := unix.Open(path, flags, 0o644)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	for what, err := range map[string]error{
		"open to write":    opened(file, unix.O_WRONLY),
		"open to truncate": opened(file, unix.O_RDONLY|unix.O_TRUNC),
		"open to append":   opened(file, unix.O_RDWR|unix.O_APPEND),
		"create":           opened(fresh, unix.O_CREAT|unix.O_WRONLY),
		"temporary file":   opened(dir, unix.O_TMPFILE|unix.O_RDWR),
		"truncate":         unix.Truncate(file, 1),
		"mkdir":            unix.Mkdir(fresh, 0o755),
		"mknod":            unix.Mknod(fresh, unix.S_IFIFO|0o644, 0),
		"link":             unix.Link(file, fresh),
		"symlink":          unix.Symlink("file", fresh),
		"unlink":           unix.Unlink(file),
		"rmdir":            unix.Rmdir(filepath.Join(dir, "odd")),
		"rename":           unix.Rename(file, fresh),
		"exchange":         unix.Renameat2(unix.AT_FDCWD, file, unix.AT_FDCWD, filepath.Join(dir, "large"), unix.RENAME_EXCHANGE),
		"chmod":            unix.Chmod(file, 0o777),
		"chown":            unix.Lchown(file, 1, 1),
		"times":            unix.Utimes(file, make([]unix.Timeval, 2)),
		"set attribute":    unix.Setxattr(file, xattr, []byte("x"), 0),
		"remove attribute": unix.Removexattr(file, xattr),
		"may it write":     unix.Access(file, unix.W_OK),
	} {
		expect(t, what, err, unix.EROFS)
	}
	if b, err := os.ReadFile(file); string(b) != text || err != nil {
		t.Errorf("afterwards: %q, %v", b, err)
	}
}

// entry is one of a directory, as getdents64(2) gives it.
type entry struct {
	ino  uint64
	next int64 // offset of the one behind it
	kind byte
	name string
}

func parse(b []byte) (list []entry) {
	for len(b) > 0 {
		n := binary.NativeEndian.Uint16(b[16:])
		name, _, _ := bytes.Cut(b[19:n], []byte{0})
		list = append(list, entry{binary.NativeEndian.Uint64(b), int64(binary.NativeEndian.Uint64(b[8:])), b[18], string(name)})
		b = b[n:]
	}
	return list
}
