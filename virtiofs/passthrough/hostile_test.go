package passthrough

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// arena is a directory to be served, with things outside that must stay as they are.
type arena struct {
	t                    testing.TB
	base, outside, share string
}

const secret = "secret of the node"

func newArena(t testing.TB) *arena {
	t.Helper()
	a := &arena{t: t, base: t.TempDir()}
	a.outside, a.share = filepath.Join(a.base, "outside"), filepath.Join(a.base, "share")
	must(t, os.Mkdir(a.outside, 0o755), os.Mkdir(a.share, 0o755), os.Mkdir(filepath.Join(a.outside, "dir"), 0o755))
	for _, name := range []string{"file", "dir/file"} {
		must(t, os.WriteFile(filepath.Join(a.outside, name), []byte(secret), 0o600))
	}
	return a
}

func (a *arena) path(name string) string { return filepath.Join(a.share, name) }

// intact fails if anything outside was touched.
func (a *arena) intact() {
	a.t.Helper()
	var names []string
	must(a.t, filepath.WalkDir(a.outside, func(path string, d os.DirEntry, err error) error {
		name, rerr := filepath.Rel(a.outside, path)
		names = append(names, name)
		if err != nil || d.IsDir() {
			return errors.Join(err, rerr)
		}
		b, err := os.ReadFile(path)
		var st unix.Stat_t
		if err := errors.Join(err, unix.Lstat(path, &st)); err != nil {
			return err
		}
		if string(b) != secret || st.Mode != unix.S_IFREG|0o600 || st.Nlink != 1 {
			a.t.Errorf("%s has become %q, mode %o, %d links", path, b, st.Mode, st.Nlink)
		}
		return rerr
	}))
	if got := strings.Join(names, " "); got != ". dir dir/file file" {
		a.t.Errorf("outside is now %q", got)
	}
	if es, err := os.ReadDir(a.base); err != nil || len(es) != 2 {
		a.t.Errorf("beside: %v, %v", es, err)
	}
}

// Names that are not names of one thing are refused by each request that has one.
func TestHostileNames(t *testing.T) {
	a := newArena(t)
	must(t, os.WriteFile(a.path("file"), []byte("x"), 0o644), os.Mkdir(a.path("dir"), 0o755), os.Symlink("../outside", a.path("link")))
	g := bootDir(t, a.share, Options{})
	file, dir := g.find("file"), g.find("dir")
	zero := make([]byte, 16)
	for _, name := range []string{"", ".", "..", "/", "../outside/file", "dir/..", "/etc/passwd", "link/file", "a/b", "dir/", strings.Repeat("x", 256), strings.Repeat("x", 900)} {
		want := syscall.EINVAL
		if len(name) > 255 {
			want = syscall.ENAMETOOLONG
		}
		for what, call := range map[string]func() syscall.Errno{
			"lookup": func() syscall.Errno { _, errno := g.lookup(name); return errno },
			"create": func() syscall.Errno { _, _, errno := g.create(dir, name); return errno },
			"mknod": func() syscall.Errno {
				_, e := g.call(opMknod, dir, text(vhosttest.U32(0o100644, 0, 0, 0), name), entrySize)
				return e
			},
			"mkdir": func() syscall.Errno {
				_, e := g.call(opMkdir, dir, text(vhosttest.U32(0o755, 0), name), entrySize)
				return e
			},
			"symlink": func() syscall.Errno {
				_, e := g.call(opSymlink, dir, text(nil, name, "target"), entrySize)
				return e
			},
			"unlink": func() syscall.Errno { _, e := g.call(opUnlink, dir, text(nil, name), 0); return e },
			"rmdir":  func() syscall.Errno { _, e := g.call(opRmdir, dir, text(nil, name), 0); return e },
			"link": func() syscall.Errno {
				_, e := g.call(opLink, dir, text(vhosttest.U64(file), name), entrySize)
				return e
			},
			"rename from": func() syscall.Errno {
				_, e := g.call(opRename, 1, text(vhosttest.U64(dir), name, "new"), 0)
				return e
			},
			"rename to": func() syscall.Errno {
				_, e := g.call(opRename2, 1, text(append(vhosttest.U64(dir), zero[:8]...), "file", name), 0)
				return e
			},
		} {
			errno := call()
			if long := len(name) > 800 && (what == "rename from" || what == "rename to" || what == "symlink"); errno != want && !long {
				t.Errorf("%s %.20q: %v, want %v", what, name, errno, want)
			}
			if errno == 0 {
				t.Errorf("%s %.20q was done", what, name)
			}
		}
	}
	// A name with an end in it is the part before; without one it is none.
	if _, errno := g.call(opLookup, 1, []byte("file"), entrySize); errno == 0 {
		t.Error("a name without an end")
	}
	a.intact()
}

// Symbolic links are read, and never followed.
func TestLinksAreNotFollowed(t *testing.T) {
	a := newArena(t)
	must(t, os.Symlink(a.outside, a.path("abs")), os.Symlink("../outside", a.path("rel")), os.Symlink("../outside/file", a.path("file")),
		os.Symlink(".", a.path("here")), unix.Mkfifo(a.path("pipe"), 0o644), os.Mkdir(a.path("dir"), 0o755))
	g := bootDir(t, a.share, Options{XAttr: true})
	for _, name := range []string{"abs", "rel", "file", "here"} {
		node := g.find(name)
		if _, errno := g.call(opLookup, node, text(nil, "file"), entrySize); errno != syscall.ENOTDIR {
			t.Errorf("lookup in %s: %v", name, errno)
		}
		if _, errno := g.open(node, syscall.O_RDWR); errno != syscall.EINVAL {
			t.Errorf("open %s: %v", name, errno)
		}
		if _, errno := g.call(opOpendir, node, make([]byte, 8), 16); errno != syscall.ENOTDIR {
			t.Errorf("opendir %s: %v", name, errno)
		}
		if _, _, errno := g.create(1, name); errno != syscall.EINVAL {
			t.Errorf("create over %s: %v", name, errno)
		}
		if _, _, errno := g.create(node, "x"); errno != syscall.ENOTDIR {
			t.Errorf("create in %s: %v", name, errno)
		}
		size := append(vhosttest.U32(1<<3, 0), make([]byte, 80)...) // FATTR_SIZE
		if _, errno := g.call(opSetattr, node, size, 104); errno != syscall.EINVAL {
			t.Errorf("truncate %s: %v", name, errno)
		}
		mode := append(vhosttest.U32(1<<0, 0), make([]byte, 80)...) // FATTR_MODE
		if _, errno := g.call(opSetattr, node, mode, 104); errno != syscall.EOPNOTSUPP {
			t.Errorf("chmod %s: %v", name, errno)
		}
		if _, errno := g.call(opSetattr, node, append(vhosttest.U32(1<<5, 0), make([]byte, 80)...), 104); errno != 0 { // FATTR_MTIME
			t.Errorf("times of %s: %v", name, errno)
		}
		if _, errno := g.call(opLink, 1, text(vhosttest.U64(node), name+"2"), entrySize); errno != 0 {
			t.Errorf("another name for %s: %v", name, errno)
		}
		if got, err := os.Readlink(a.path(name + "2")); err != nil {
			t.Errorf("the other name of %s: %q, %v", name, got, err)
		}
	}
	pipe := g.find("pipe")
	if _, errno := g.open(pipe, syscall.O_RDONLY); errno != syscall.EINVAL {
		t.Errorf("open a pipe: %v", errno)
	}
	a.intact()
}

// Numbers that a guest makes up, or uses again.
func TestForgedNumbers(t *testing.T) {
	a := newArena(t)
	must(t, os.WriteFile(a.path("file"), []byte("content"), 0o644), os.WriteFile(a.path("other"), []byte("another"), 0o644), os.Mkdir(a.path("dir"), 0o755))
	f := open(t, a.share, Options{XAttr: true})
	tree := virtiofs.NewTree()
	must(t, tree.Mount("/", f))
	g := boot(t, tree)
	file, other, dir := g.find("file"), g.find("other"), g.find("dir")
	handle, errno := g.open(file, syscall.O_RDWR)
	if errno != 0 {
		t.Fatal(errno)
	}
	list, errno := g.call(opOpendir, dir, make([]byte, 8), 16)
	if errno != 0 {
		t.Fatal(errno)
	}
	dirHandle := binary.LittleEndian.Uint64(list)
	for _, tc := range []struct {
		name         string
		node, handle uint64
	}{{"no handle", file, 99}, {"handle of another file", other, handle}, {"no node", 999, handle}, {"huge", math.MaxUint64, math.MaxUint64},
		{"other subtree", 5<<48 | file, handle}, {"directory", dir, dirHandle}, {"file of a directory's handle", file, dirHandle}} {
		if _, errno := g.read(tc.node, tc.handle, 0, 100); errno == 0 {
			t.Errorf("read with %s", tc.name)
		}
		if errno := g.write(tc.node, tc.handle, 0, "bad"); errno == 0 {
			t.Errorf("write with %s", tc.name)
		}
		size := append(append(vhosttest.U32(1<<3|1<<6, 0), vhosttest.U64(tc.handle)...), make([]byte, 72)...) // FATTR_SIZE and FH
		if _, errno := g.call(opSetattr, tc.node, size, 104); errno == 0 {
			t.Errorf("truncate with %s", tc.name)
		}
		for _, op := range []uint32{opFlush, opFallocate, opLseek} {
			if _, errno := g.call(op, tc.node, vhosttest.U64(tc.handle, 0, 1, 0), 16); errno == 0 {
				t.Errorf("opcode %d with %s", op, tc.name)
			}
		}
	}
	for name, call := range map[string]func() syscall.Errno{
		"read far away":  func() syscall.Errno { _, e := g.read(file, handle, 1<<63, 10); return e },
		"write far away": func() syscall.Errno { return g.write(file, handle, math.MaxInt64, "bad") },
		"list far away": func() syscall.Errno {
			_, e := g.call(opReaddir, dir, vhosttest.U64(dirHandle, 1<<63, 4096, 0, 0), 4096)
			return e
		},
		"seek nowhere": func() syscall.Errno { _, e := g.call(opLseek, file, vhosttest.U64(handle, 1, 99), 8); return e },
		"own by nobody": func() syscall.Errno {
			_, e := g.call(opSetattr, file, append(vhosttest.U32(1<<1, 0), append(make([]byte, 68), 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0)...), 104)
			return e
		},
		"copy far away": func() syscall.Errno {
			_, e := g.call(opCopy, file, vhosttest.U64(handle, 1<<63, file, handle, 0, 1<<62, 0), 8)
			return e
		},
		"copy to subtree": func() syscall.Errno {
			_, e := g.call(opCopy, file, vhosttest.U64(handle, 0, 7<<48|file, handle, 0, 1, 0), 8)
			return e
		},
		"link of subtree": func() syscall.Errno {
			_, e := g.call(opLink, 1, text(vhosttest.U64(7<<48|file), "new"), entrySize)
			return e
		},
		"move to subtree": func() syscall.Errno {
			_, e := g.call(opRename, 1, text(vhosttest.U64(7<<48|1), "file", "new"), 0)
			return e
		},
		"link of nothing": func() syscall.Errno { _, e := g.call(opLink, 1, text(vhosttest.U64(999), "new"), entrySize); return e },
		"set attribute of another size": func() syscall.Errno {
			_, e := g.call(opSetxattr, file, text(vhosttest.U32(1<<20, 0), "user.x", "value"), 0)
			return e
		},
		"trusted attribute": func() syscall.Errno {
			_, e := g.call(opSetxattr, file, text(vhosttest.U32(1, 0), "trusted.overlay.opaque", ""), 0)
			return e
		},
		"temporary file": func() syscall.Errno {
			_, e := g.call(51, 1, text(vhosttest.U32(2, 0o644, 0, 0), "/"), entrySize+16)
			return e
		},
		"ioctl": func() syscall.Errno { _, e := g.call(39, file, vhosttest.U64(handle, 0, 1<<32, 0), 64); return e },
		"lock":  func() syscall.Errno { _, e := g.call(32, file, make([]byte, 48), 64); return e },
	} {
		if errno := call(); errno == 0 {
			t.Errorf("%s was done", name)
		}
	}
	// After its release, a handle is nothing; after it was forgotten, a node is nothing.
	g.must(opRelease, file, vhosttest.U64(handle, 0, 0))
	if _, errno := g.read(file, handle, 0, 10); errno != syscall.EBADF {
		t.Errorf("read after release: %v", errno)
	}
	g.must(opForget, file, vhosttest.U64(math.MaxUint64))
	g.must(opBatchForget, 0, append(vhosttest.U32(1000, 0), vhosttest.U64(other, 1, 1, 99, 999, 5)...))
	for name, node := range map[string]uint64{"forgotten": file, "forgotten with others": other} {
		if _, errno := g.call(opGetattr, node, make([]byte, 16), 104); errno != syscall.ESTALE {
			t.Errorf("attributes of what was %s: %v", name, errno)
		}
	}
	if again := g.find("file"); again == file {
		t.Error("the number of a forgotten node was used again")
	}
	if b, err := os.ReadFile(a.path("file")); err != nil || string(b) != "content" {
		t.Errorf("the file is %q, %v", b, err)
	}
	a.intact()
}

// Nodes and handles are bounded, counted, and gone with the session.
func TestBudget(t *testing.T) {
	a := newArena(t)
	for i := range 20 {
		must(t, os.WriteFile(a.path(fmt.Sprint("f", i)), nil, 0o644))
	}
	b := NewBudget(10)
	var log bytes.Buffer
	f := open(t, a.share, Options{Budget: b, Log: slog.New(slog.NewTextHandler(&log, nil))})
	tree := virtiofs.NewTree()
	must(t, tree.Mount("/", f))
	g := boot(t, tree)
	fill := func() (opened int, errno syscall.Errno) {
		for i := range 20 {
			if _, errno = g.lookup(fmt.Sprint("f", i)); errno != 0 {
				return i, errno
			}
		}
		return 20, 0
	}
	if n, errno := fill(); n != 9 || errno != syscall.ENFILE { // and the root
		t.Fatalf("%d files are known, then %v", n, errno)
	}
	if _, errno := g.lookup("f1"); errno != syscall.ENFILE {
		t.Errorf("known file in need of a descriptor: %v", errno)
	}
	g.must(opForget, 2, vhosttest.U64(1))
	if _, _, errno := g.create(1, "new"); errno != syscall.ENFILE { // needs two
		t.Errorf("create: %v", errno)
	}
	if used := b.used.Load(); used != 9 {
		t.Errorf("%d descriptors are used", used)
	}
	// What was listed is not told when there is no room for it.
	h, errno := g.call(opOpendir, 1, make([]byte, 8), 16)
	if errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := g.call(opReaddirplus, 1, append(h[:8], vhosttest.U64(0, 8000, 0, 0)...), 8000); errno != 0 {
		t.Errorf("list: %v", errno)
	}
	for range 3 {
		g.init()
		if used := b.used.Load(); used != 1 {
			t.Errorf("%d descriptors are used by a new session", used)
		}
		if n, errno := fill(); n != 9 || errno != syscall.ENFILE {
			t.Errorf("%d files are known, then %v", n, errno)
		}
	}
	g.must(opDestroy, 0, nil)
	if used := b.used.Load(); used != 1 {
		t.Errorf("%d descriptors are used after the session", used)
	}
	must(t, f.Close())
	if n := strings.Count(log.String(), "RLIMIT_NOFILE"); n != 1 {
		t.Errorf("the log says it %d times: %s", n, &log)
	}
	if used := b.used.Load(); used != 0 {
		t.Errorf("%d descriptors are used after all", used)
	}
	if _, errno := g.lookup("f1"); errno != syscall.ESTALE {
		t.Errorf("lookup after all: %v", errno)
	}
}

// swap makes a name a directory and a link to the outside in turn, until stop is
// closed.
func (a *arena) swap(stop chan struct{}, name, target string) error {
	real, link := a.path(name+".real"), a.path(name+".link")
	if err := errors.Join(os.Mkdir(real, 0o755), os.WriteFile(filepath.Join(real, "file"), []byte("inside"), 0o644), os.Symlink(target, link)); err != nil {
		return err
	}
	for i := 0; ; i++ {
		select {
		case <-stop:
			return nil
		default:
		}
		for _, from := range []string{real, link} {
			if err := errors.Join(os.Rename(from, a.path(name)), os.Rename(a.path(name), from)); err != nil {
				return err
			}
		}
		// A directory that is moved while it is in use, and comes back.
		if err := errors.Join(os.Rename(real, a.path("moved")), os.Rename(a.path("moved"), real)); err != nil {
			return err
		}
	}
}

// While the node swaps directories for links to the outside, nothing there is ever
// read, made, changed or removed.
func TestRaces(t *testing.T) {
	for name, target := range map[string]string{"absolute": "", "relative": "../outside", "above": "..", "root": "/"} {
		t.Run(name, func(t *testing.T) {
			a := newArena(t)
			if target == "" {
				target = a.outside
			}
			stop := make(chan struct{})
			var host sync.WaitGroup
			host.Go(func() {
				if err := a.swap(stop, "dir", target); err != nil {
					t.Error(err)
				}
			})
			g := bootDir(t, a.share, Options{Cache: CacheNever})
			done := map[uint32]int{}
			for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
				g.raid(t, "dir", done)
			}
			close(stop)
			host.Wait()
			for _, op := range []uint32{opLookup, opOpen, opRead, opWrite, opCreate, opLink, opMkdir, opSymlink, opMknod, opRename, opRename2, opUnlink, opRmdir, opReaddirplus, opSetattr} {
				if done[op] == 0 {
					t.Errorf("opcode %d never succeeded, so it was not tried", op)
				}
			}
			t.Logf("successes by their opcode: %v", done)
			a.intact()
		})
	}
}

// raid does everything that a guest can with a name, and counts what of it succeeded.
func (g *guest) raid(t *testing.T, name string, done map[uint32]int) {
	count := func(op uint32, errno syscall.Errno) bool {
		if errno == 0 {
			done[op]++
		}
		return errno == 0
	}
	do := func(op uint32, node uint64, body []byte) []byte {
		b, errno := g.call(op, node, body, 4096)
		count(op, errno)
		return b
	}
	dir, errno := g.lookup(name)
	if !count(opLookup, errno) {
		return
	}
	if node, errno := g.lookup(name, "file"); count(opLookup, errno) {
		if h, errno := g.open(node, syscall.O_RDWR); count(opOpen, errno) {
			b, errno := g.read(node, h, 0, 100)
			if count(opRead, errno); string(b) == secret {
				t.Fatal("the guest reads what is outside")
			}
			count(opWrite, g.write(node, h, 0, "inside"))
			do(opRelease, node, vhosttest.U64(h, 0, 0))
		}
		do(opLink, dir, text(vhosttest.U64(node), "link"))
		do(opSetattr, node, append(append(vhosttest.U32(1, 0), make([]byte, 60)...), vhosttest.U32(0o644, 0, 0, 0, 0)...))
		do(opForget, node, vhosttest.U64(1))
	}
	if node, h, errno := g.create(dir, "made"); count(opCreate, errno) {
		count(opWrite, g.write(node, h, 0, "made"))
		do(opRelease, node, vhosttest.U64(h, 0, 0))
	}
	exchange := text(vhosttest.U64(dir, unix.RENAME_EXCHANGE), "file", "renamed")
	for _, c := range []struct {
		op   uint32
		body []byte
	}{
		{opMkdir, text(vhosttest.U32(0o755, 0), "sub")}, {opSymlink, text(nil, "sym", "/")}, {opMknod, text(vhosttest.U32(unix.S_IFIFO|0o644, 0, 0, 0), "fifo")},
		{opRename, text(vhosttest.U64(dir), "made", "renamed")}, {opRename2, exchange}, {opRename2, exchange},
		{opUnlink, text(nil, "renamed")}, {opUnlink, text(nil, "link")}, {opUnlink, text(nil, "sym")}, {opUnlink, text(nil, "fifo")}, {opRmdir, text(nil, "sub")},
		{opRmdir, text(nil, "dir")},
	} {
		do(c.op, dir, c.body)
	}
	if h := do(opOpendir, dir, make([]byte, 8)); len(h) >= 8 {
		do(opReaddirplus, dir, append(h[:8:8], vhosttest.U64(0, 4096, 0, 0)...))
		do(opReleasedir, dir, append(h[:8:8], vhosttest.U64(0, 0)...))
	}
	do(opForget, dir, vhosttest.U64(1))
}
