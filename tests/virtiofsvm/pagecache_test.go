package virtiofsvm

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/tests/vmtest"
	"golang.org/x/sys/unix"
)

// TestPageCacheIsShared has two machines read the same image. The first one's
// device reads it from the disk. The second one's reads nothing from there and
// keeps nothing itself: the image is in the node's memory once. (What guests read
// through their own page cache they keep besides: to share that needs DAX, which
// QEMU's vhost-user-fs-pci has not.)
func TestPageCacheIsShared(t *testing.T) {
	t.Run("files of a directory", func(t *testing.T) {
		f := newFixture(t)
		path := filepath.Join(f.dir, "large")
		want := writeLarge(t, path)
		testShared(t, []string{path}, "large", want, func(name string) reader {
			socket := f.socket + name
			return startReader(t, serve(t, nil, "--socket-path", socket, "--shared-dir", f.dir), socket)
		})
	})
	t.Run("images of the node", func(t *testing.T) {
		f := newFixture(t)
		base := filepath.Dir(f.dir)
		tree := filepath.Join(base, "large")
		if err := os.Mkdir(tree, 0o755); err != nil {
			t.Fatal(err)
		}
		writeLarge(t, filepath.Join(tree, "large"))
		build(t, base, "./host/cmd/tatami-host")
		n := newHost(t, base, base, tree)
		testShared(t, n.files(), sharedimages.Name(n.image), "", func(name string) reader {
			socket := f.socket + name
			r := startReader(t, n.serve(name, socket), socket)
			n.grant(r.g, name)
			return r
		})
	})
}

// files are the large ones of the store.
func (n *host) files() (list []string) {
	n.t.Helper()
	err := filepath.WalkDir(filepath.Join(n.root, "store"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if info, err := d.Info(); err == nil && info.Size() > largeSize/2 {
			list = append(list, path)
		}
		return nil
	})
	if err != nil || len(list) == 0 {
		n.t.Fatalf("large files of the store: %v, %v", list, err)
	}
	return list
}

const largeSize = 64 << 20

// testShared has machines read a file of their device, whose bytes are those of
// files here. want is what sha256sum says of it; "" is what it says the first time.
func testShared(t *testing.T, files []string, name, want string, machine func(name string) reader) {
	var pages mappings
	for _, path := range files {
		pages = append(pages, mapFile(t, path))
	}
	pages.evict(t)

	first := machine("first")
	before := first.d.counter(t, "io", "read_bytes")
	got := first.sum(name)
	if want = cmp.Or(want, got); got != want {
		t.Errorf("the first machine reads %q, want %q", got, want)
	}
	if n := first.d.counter(t, "io", "read_bytes") - before; n < largeSize*9/10 {
		t.Skipf("needs a directory for temporary files on a disk: reading %d bytes took %d from there", largeSize, n)
	}
	if n := pages.resident(t); n < largeSize*9/10 {
		t.Errorf("%d bytes are in the page cache after the first machine has read %d", n, largeSize)
	}
	// From here on a test of something else that drops the page cache changes nothing.
	pages.lock(t)

	second, all := machine("second"), pages.resident(t)
	disk, own := second.d.counter(t, "io", "read_bytes"), second.d.counter(t, "smaps_rollup", "Anonymous")
	if got := second.sum(name); got != want {
		t.Errorf("the second machine reads %q, want %q", got, want)
	}
	if n := second.d.counter(t, "io", "read_bytes") - disk; n > largeSize/100 { // its program may have been read
		t.Errorf("%d bytes were read from the disk for the second machine", n)
	}
	if n := (second.d.counter(t, "smaps_rollup", "Anonymous") - own) << 10; n > largeSize/2 {
		t.Errorf("the second machine's device has %d bytes more after reading %d", n, largeSize)
	}
	if n := pages.resident(t); n != all {
		t.Errorf("%d bytes are in the page cache in the end, %d before the second machine has read", n, all)
	}
}

// writeLarge makes a file, and returns what sha256sum says of it.
func writeLarge(t *testing.T, path string) string {
	t.Helper()
	b := make([]byte, largeSize)
	rand.New(rand.NewSource(2)).Read(b)
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// reader is a machine with its device.
type reader struct {
	d *daemon
	g *guest
}

func startReader(t *testing.T, d *daemon, socket string) reader {
	t.Helper()
	r := reader{d: d, g: start(t, vmtest.Options{MemoryMiB: 256, Args: device("images", socket, 1)})}
	r.g.sh(mountFS)
	return r
}

// sum reads a file past the guest's page cache.
func (r reader) sum(name string) string {
	sum, _, _ := strings.Cut(r.g.sh("set -o pipefail; dd if=/fs/"+name+" bs=1M iflag=direct 2>/dev/null | sha256sum"), " ")
	return sum
}

// mappings are of several files.
type mappings []*mapped

func (l mappings) evict(t *testing.T) {
	t.Helper()
	for _, m := range l {
		m.evict(t)
	}
}

func (l mappings) lock(t *testing.T) {
	t.Helper()
	for _, m := range l {
		m.lock(t)
	}
}

func (l mappings) resident(t *testing.T) (n int) {
	t.Helper()
	for _, m := range l {
		n += m.resident(t)
	}
	return n
}

// mapped is a file whose pages are looked at. Mapping does not read them.
type mapped struct {
	f *os.File
	b []byte
}

func mapFile(t *testing.T, path string) *mapped {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(b); err != nil {
			t.Error(err)
		}
		f.Close()
	})
	return &mapped{f, b}
}

// evict writes the file and drops its pages.
func (m *mapped) evict(t *testing.T) {
	t.Helper()
	if err := m.f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(m.f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
}

// lock reads what is missing of the file, and keeps its pages.
func (m *mapped) lock(t *testing.T) {
	t.Helper()
	if err := unix.Mlock(m.b); err != nil {
		t.Skipf("needs to lock %d bytes: %v", len(m.b), err)
	}
}

// resident counts bytes in the page cache (mincore(2)).
func (m *mapped) resident(t *testing.T) (n int) {
	t.Helper()
	page := os.Getpagesize()
	pages := make([]byte, (len(m.b)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m.b[0])), uintptr(len(m.b)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		t.Fatal(errno)
	}
	for _, p := range pages {
		n += page * int(p&1)
	}
	return n
}
