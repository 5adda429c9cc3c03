package posix

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// What is in the tree of Prepare.
const (
	text      = "hello world"
	mode      = 0o754
	names     = 168          // in a directory of more than one block of getdents
	largeSize = 1<<20 + 4000 // of content's bytes; not whole pages
	holeSize  = 1 << 20
	xattr     = "user.tatami"
	longest   = 254 // bytes of a name; 255 are too many for mkfs.erofs 1.5
)

var content = bytes.Repeat([]byte("abcxyz\n"), largeSize/7+1)[:largeSize]

// odd are names that only a file system without opinions keeps.
var odd = []string{strings.Repeat("n", longest), "ä☃", "a b\tc\nd", "\xff\xfe", "-n"}

// Prepare makes the tree that the tests of a read-only file system expect.
func Prepare(dir string) error {
	p := preparer{dir: dir}
	p.do(os.MkdirAll(p.path("many"), 0o755))
	p.do(os.MkdirAll(p.path("odd"), 0o755))
	for i := range names {
		p.write(fmt.Sprintf("many/file%036x", i), nil)
	}
	for _, name := range odd {
		p.write("odd/"+name, []byte(name))
	}
	p.write("file", []byte(text))
	p.do(os.Chmod(p.path("file"), mode))
	p.do(os.Link(p.path("file"), p.path("hard")))
	p.do(os.Symlink("/foobar", p.path("link")))
	p.do(os.Symlink("file", p.path("to-file")))
	p.do(unix.Setxattr(p.path("file"), xattr, []byte(text), 0))
	p.write("large", content)
	p.write("hole", nil)
	p.do(os.Truncate(p.path("hole"), holeSize))
	p.do(unix.Mkfifo(p.path("pipe"), 0o600))
	return errors.Join(p.errs...)
}

type preparer struct {
	dir  string
	errs []error
}

func (p *preparer) path(name string) string { return filepath.Join(p.dir, name) }

func (p *preparer) do(err error) { p.errs = append(p.errs, err) }

func (p *preparer) write(name string, data []byte) {
	p.do(os.WriteFile(p.path(name), data, 0o644))
}
