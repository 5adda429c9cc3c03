package passthrough

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// listing is what READDIRPLUS tells of a directory: nodes by their names.
func (g *guest) listing(dir uint64) map[string]uint64 {
	g.t.Helper()
	h, errno := g.call(opOpendir, dir, make([]byte, 8), 16)
	if errno != 0 {
		g.t.Fatal(errno)
	}
	le, nodes := binary.LittleEndian, map[string]uint64{}
	for off := uint64(0); ; {
		b, errno := g.call(opReaddirplus, dir, append(h[:8:8], vhosttest.U64(off, 700, 0, 0)...), 700)
		if errno != 0 {
			g.t.Fatal(errno)
		}
		if len(b) == 0 {
			g.must(opReleasedir, dir, append(h[:8:8], vhosttest.U64(0, 0)...))
			return nodes
		}
		for len(b) > 0 { // fuse_entry_out, then ino, off, length of the name, type, name
			n := int(le.Uint32(b[entrySize+16:]))
			nodes[string(b[entrySize+24:][:n])] = le.Uint64(b)
			off = le.Uint64(b[entrySize+8:])
			b = b[min(len(b), (entrySize+24+n+7)&^7):]
		}
	}
}

// One device shows several directories of the node, and images.
func TestTree(t *testing.T) {
	a, b := newArena(t), newArena(t)
	must(t, os.WriteFile(a.path("file"), []byte("a"), 0o644), os.Mkdir(a.path(".tatami"), 0o755), os.WriteFile(a.path(".tatami/own"), nil, 0o644))
	for i := range 30 {
		must(t, os.WriteFile(b.path(fmt.Sprint("f", i)), fmt.Append(nil, "b", i), 0o644))
	}
	tree, budget := virtiofs.NewTree(), NewBudget(1000)
	lower := open(t, b.share, Options{ReadOnly: true, Budget: budget})
	must(t, tree.Mount("/", open(t, a.share, Options{Budget: budget})), tree.Mount("/.tatami", virtiofs.NewDirectory()),
		tree.Mount("/rafs/one/lowerdir", lower), tree.Mount("/rafs/two/lowerdir", open(t, a.share, Options{Budget: budget})))
	g := boot(t, tree)

	nodes := g.listing(g.find("rafs", "one", "lowerdir"))
	if len(nodes) != 32 || nodes["."] != 0 || nodes[".."] != 0 {
		t.Errorf("listing of a subtree: %v", nodes)
	}
	for name, node := range nodes {
		if node == 0 {
			continue
		}
		h, errno := g.open(node, syscall.O_RDONLY)
		if errno != 0 {
			t.Fatalf("%s: %v", name, errno)
		}
		if got, errno := g.read(node, h, 0, 10); errno != 0 || string(got) != "b"+name[1:] {
			t.Errorf("%s, node %x: %q, %v", name, node, got, errno)
		}
	}
	if got := slices.Sorted(maps.Keys(g.listing(g.find("rafs")))); !slices.Equal(got, []string{"one", "two"}) {
		t.Errorf("a directory of the tree: %q", got)
	}
	// What is mounted at a name hides what has it, and cannot be changed by it.
	if _, errno := g.lookup(".tatami", "own"); errno != syscall.ENOENT {
		t.Errorf("below a mount: %v", errno)
	}
	if got := g.listing(1); got["file"] == 0 || got[".tatami"] != 0 {
		t.Errorf("listing around a mount: %v", got)
	}
	for op, body := range map[uint32][]byte{opRmdir: text(nil, ".tatami"), opUnlink: text(nil, "rafs"), opMkdir: text(vhosttest.U32(0o755, 0), "rafs"),
		opRename: text(vhosttest.U64(1), ".tatami", "x"), opRename2: text(vhosttest.U64(1, 0), "file", ".tatami")} {
		if _, errno := g.call(op, 1, body, entrySize); errno != syscall.EBUSY {
			t.Errorf("opcode %d at a mount: %v", op, errno)
		}
	}
	two := g.find("rafs", "two", "lowerdir")
	if _, errno := g.call(opRename, 1, text(vhosttest.U64(two), "file", "moved"), 0); errno != syscall.EXDEV {
		t.Errorf("move between subtrees: %v", errno)
	}
	if _, errno := g.call(opLink, two, text(vhosttest.U64(g.find("file")), "linked"), entrySize); errno != syscall.EXDEV {
		t.Errorf("link between subtrees: %v", errno)
	}
	if _, _, errno := g.create(g.find("rafs", "one", "lowerdir"), "new"); errno != syscall.EROFS {
		t.Errorf("create in a read-only subtree: %v", errno)
	}
	if node, h, errno := g.create(two, "new"); errno != 0 || g.write(node, h, 0, "new") != 0 {
		t.Errorf("create in a subtree: %v", errno)
	}
	if got, err := os.ReadFile(a.path("new")); err != nil || string(got) != "new" {
		t.Errorf("%q, %v", got, err)
	}
	must(t, tree.Unmount("/rafs/one/lowerdir"), lower.Close())
	if _, errno := g.call(opGetattr, nodes["f1"], make([]byte, 16), 104); errno != syscall.ESTALE {
		t.Errorf("file of what was unmounted: %v", errno)
	}
	g.must(opForget, nodes["f1"], vhosttest.U64(1))
}

// What a guest may keep is virtiofsd's choice for each mode (its main.rs, timeout, and
// passthrough/mod.rs, do_open).
func TestCacheModes(t *testing.T) {
	const directIO, keepCache, cacheDir = 1, 2, 8 // FOPEN_ of linux/fuse.h
	for _, tc := range []struct {
		cache     Cache
		valid     uint64
		file, dir uint32
	}{{CacheNever, 0, directIO, 0}, {"", 1, 0, 0}, {CacheAuto, 1, 0, 0}, {CacheMetadata, 86400, directIO, keepCache | cacheDir}, {CacheAlways, 86400, keepCache, keepCache | cacheDir}} {
		t.Run(string(tc.cache), func(t *testing.T) {
			a := newArena(t)
			g := bootDir(t, a.share, Options{Cache: tc.cache})
			b, errno := g.call(opCreate, 1, text(vhosttest.U32(syscall.O_RDWR, 0o644, 0, 0), "file"), entrySize+16)
			if errno != 0 {
				t.Fatal(errno)
			}
			le := binary.LittleEndian
			if name, attr := le.Uint64(b[16:]), le.Uint64(b[24:]); name != tc.valid || attr != tc.valid {
				t.Errorf("name valid for %d s, attributes for %d s", name, attr)
			}
			created := le.Uint32(b[entrySize+8:])
			b, errno = g.call(opOpen, le.Uint64(b), make([]byte, 8), 16)
			dir, derrno := g.call(opOpendir, 1, make([]byte, 8), 16)
			if errno != 0 || derrno != 0 {
				t.Fatal(errno, derrno)
			}
			if opened, listed := le.Uint32(b[8:]), le.Uint32(dir[8:]); created != tc.file || opened != tc.file || listed != tc.dir {
				t.Errorf("flags of a file that was made %x, opened %x, of a directory %x", created, opened, listed)
			}
		})
	}
	root, err := os.Open(filepath.Join(t.TempDir()))
	must(t, err)
	defer root.Close()
	if _, err := New(root, Options{Cache: "some"}); err == nil {
		t.Error("a mode that is none")
	}
}
