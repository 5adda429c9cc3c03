package virtiofs

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

// walk looks up one name after the other, from the root.
func (g *guest) walk(names ...string) (node uint64, errno syscall.Errno) {
	g.t.Helper()
	node = 1
	for _, n := range names {
		b, errno := g.call(1, message(opLookup, node, append([]byte(n), 0)), 144)
		if errno != 0 {
			return 0, errno
		}
		node = binary.LittleEndian.Uint64(b)
	}
	return node, 0
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestTree(t *testing.T) {
	tree := NewTree()
	must(t, tree.Mount("/.tatami", directory(t, map[string]File{"image": good(100)})),
		tree.Mount("/rafs/one/lowerdir", directory(t, map[string]File{"a": good(1)})),
		tree.Mount("/rafs/two/lowerdir", directory(t, map[string]File{"b": good(2)})))
	g := initialized(t, Config{Tree: tree})
	image, errno := g.walk(".tatami", "image")
	if errno != 0 {
		t.Fatal(errno)
	}
	if got, errno := g.read(image, 10, 50); errno != 0 || !bytes.Equal(got, contents(10, 50)) {
		t.Errorf("read: %v, %x", errno, got)
	}
	for path, want := range map[string][]string{"": {".tatami", "rafs"}, "rafs": {"one", "two"}, "rafs/two/lowerdir": {"b"}} {
		dir, errno := g.walk(strings.FieldsFunc(path, func(r rune) bool { return r == '/' })...)
		if got := g.list(dir); errno != 0 || !slices.Equal(got, want) {
			t.Errorf("/%s: %v, %q", path, errno, got)
		}
	}
	lower, _ := g.walk("rafs", "one", "lowerdir")
	a, _ := g.walk("rafs", "one", "lowerdir", "a")
	must(t, tree.Unmount("/rafs/one/lowerdir"))
	for name, node := range map[string]uint64{"root": lower, "file": a} {
		if _, errno := g.call(1, message(3, node, words(0, 0)), 120); errno != syscall.ESTALE {
			t.Errorf("attributes of the %s of what was unmounted: %v", name, errno)
		}
	}
	if _, errno := g.read(a, 0, 1); errno != syscall.ESTALE {
		t.Errorf("read of what was unmounted: %v", errno)
	}
	if _, errno := g.walk("rafs", "one"); errno != syscall.ENOENT {
		t.Errorf("a directory above nothing: %v", errno)
	}
	must(t, tree.Mount("/rafs/one/lowerdir", directory(t, map[string]File{"c": good(1)})))
	if _, errno := g.walk("rafs", "one", "lowerdir", "a"); errno != syscall.ENOENT {
		t.Errorf("old file in a new subtree: %v", errno)
	}
	if c, errno := g.walk("rafs", "one", "lowerdir", "c"); errno != 0 || c == a {
		t.Errorf("node %x was used again, %v", c, errno)
	}
	if _, errno := g.call(1, message(9, 1, append(words(0), "new\x00"...)), 144); errno != syscall.EROFS {
		t.Errorf("make a directory: %v", errno)
	}
}

// Beside other subtrees, no answer may make Linux conclude that nobody knows a request.
func TestTreeAnswersForImages(t *testing.T) {
	tree := NewTree()
	must(t, tree.Mount("/", directory(t, map[string]File{"image": good(1)})))
	g := initialized(t, Config{Tree: tree, XAttr: true})
	node, _ := g.walk("image")
	for opcode, want := range map[uint32]syscall.Errno{opFlush: 0, opFsync: 0, opGetxattr: syscall.EOPNOTSUPP, 46: syscall.EOPNOTSUPP, 35: syscall.EROFS} {
		if _, errno := g.call(1, message(opcode, node, make([]byte, 64)), 200); errno != want {
			t.Errorf("opcode %d: %v, want %v", opcode, errno, want)
		}
	}
}

func TestTreePaths(t *testing.T) {
	tree, d := NewTree(), NewDirectory()
	for _, path := range []string{"", "a", "/a/", "//a", "/a/../b", "/.", "/" + strings.Repeat("x", 256), "/a\x00"} {
		if err := tree.Mount(path, d); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", path, err)
		}
	}
	must(t, tree.Mount("/", d), tree.Mount("/a/b", d))
	for _, path := range []string{"/", "/a/b"} {
		if err := tree.Mount(path, d); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%q again: %v", path, err)
		}
	}
	for _, path := range []string{"/a", "/c"} {
		if err := tree.Unmount(path); !errdefs.IsNotFound(err) {
			t.Errorf("unmount %q: %v", path, err)
		}
	}
	must(t, tree.Unmount("/a/b"), tree.Unmount("/"))
	if len(tree.subs) != 0 || len(tree.dirs) != 0 || len(tree.root.names) != 0 {
		t.Errorf("left: %+v", tree)
	}
}

// Indices come round without one that is in use.
func TestTreeIndices(t *testing.T) {
	tree, d := NewTree(), NewDirectory()
	must(t, tree.Mount("/stays", d))
	for range 2 * dirIndex {
		must(t, tree.Mount("/goes", d), tree.Unmount("/goes"))
	}
	if m := tree.find(1 << indexShift); m == nil || m.at.name != "stays" || len(tree.subs) != 1 {
		t.Errorf("%+v", tree.subs)
	}
}
