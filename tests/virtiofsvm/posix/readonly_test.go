package posix

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// reading are the tests of a read-only tree, which dir is.
var reading = map[string]func(t *testing.T, dir string){
	"FileBasic":        testFileBasic,
	"Link":             testLink,
	"SymlinkReadlink":  testSymlinkReadlink,
	"ReadDir":          testReadDir,
	"DirSeek":          testDirSeek,
	"Names":            testNames,
	"OpenAt":           testOpenAt,
	"ParallelFileOpen": testParallelFileOpen,
	"FdLeak":           testFdLeak,
	"Lseek":            testLseek,
	"Hole":             testHole,
	"DirectIO":         testDirectIO,
	"Mmap":             testMmap,
	"Offsets":          testOffsets,
	"XAttr":            testXAttr,
	"Locks":            testLocks,
	"Statfs":           testStatfs,
}

func open(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func expect(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func testFileBasic(t *testing.T, dir string) {
	path := filepath.Join(dir, "file")
	b, err := os.ReadFile(path)
	if string(b) != text || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() != int64(len(text)) || st.Mode() != mode {
		t.Errorf("%v, %v", st, err)
	}
	expect(t, "a file as a directory", unix.Access(filepath.Join(path, "x"), unix.F_OK), unix.ENOTDIR)
	expect(t, "a missing file", unix.Access(filepath.Join(dir, "missing"), unix.F_OK), unix.ENOENT)
}

func testLink(t *testing.T, dir string) {
	var a, b unix.Stat_t
	err := errors.Join(unix.Lstat(filepath.Join(dir, "file"), &a), unix.Lstat(filepath.Join(dir, "hard"), &b))
	if err != nil || a != b && a.Atim == b.Atim || a.Ino != b.Ino || a.Nlink != 2 {
		t.Errorf("%+v and %+v, %v", a, b, err)
	}
}

func testSymlinkReadlink(t *testing.T, dir string) {
	if got, err := os.Readlink(filepath.Join(dir, "link")); got != "/foobar" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "to-file"))
	if string(b) != text || err != nil {
		t.Errorf("through a link: %q, %v", b, err)
	}
	_, err = unix.Open(filepath.Join(dir, "to-file"), unix.O_RDONLY|unix.O_NOFOLLOW, 0)
	expect(t, "O_NOFOLLOW", err, unix.ELOOP)
}

func testReadDir(t *testing.T, dir string) {
	entries, err := os.ReadDir(filepath.Join(dir, "many"))
	if err != nil || len(entries) != names {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for i, e := range entries { // in the order of their names
		if want := fmt.Sprintf("file%036x", i); e.Name() != want || !e.Type().IsRegular() {
			t.Errorf("%v, want %s", e, want)
		}
	}
}

// testDirSeek goes back to the place of every entry.
func testDirSeek(t *testing.T, dir string) {
	fd := open(t, filepath.Join(dir, "many"), unix.O_RDONLY|unix.O_DIRECTORY)
	buf := make([]byte, 4096)
	var list []entry
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		list = append(list, parse(buf[:n])...)
	}
	if len(list) != names+2 {
		t.Fatalf("%d entries", len(list))
	}
	for i := len(list) - 1; i > 0; i-- {
		if _, err := unix.Seek(fd, list[i-1].next, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		n, err := unix.Getdents(fd, buf)
		if err != nil || n == 0 {
			t.Fatalf("entry %d: %d bytes, %v", i, n, err)
		}
		if got := parse(buf[:n])[0]; got != list[i] {
			t.Errorf("entry %d: %v, want %v", i, got, list[i])
		}
	}
}

func testNames(t *testing.T, dir string) {
	f, err := os.Open(filepath.Join(dir, "odd"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := f.Readdirnames(-1)
	slices.Sort(got)
	if want := slices.Sorted(slices.Values(odd)); err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
	for _, name := range odd {
		if b, err := os.ReadFile(filepath.Join(dir, "odd", name)); string(b) != name || err != nil {
			t.Errorf("%q: %q, %v", name, b, err)
		}
	}
	expect(t, "a name of 256 bytes", unix.Access(filepath.Join(dir, odd[0]+"nn"), unix.F_OK), unix.ENAMETOOLONG)
}

func testOpenAt(t *testing.T, dir string) {
	d := open(t, filepath.Join(dir, "odd"), unix.O_PATH)
	fd, err := unix.Openat(d, "../file", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	b := make([]byte, 100)
	if n, err := unix.Read(fd, b); string(b[:max(n, 0)]) != text || err != nil {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
}

func testParallelFileOpen(t *testing.T, dir string) {
	var g errgroup.Group
	for range 10 {
		g.Go(func() error {
			b, err := os.ReadFile(filepath.Join(dir, "large"))
			if err == nil && !bytes.Equal(b, content) {
				err = errors.New("other bytes")
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func testFdLeak(t *testing.T, dir string) {
	before := descriptors(t)
	for range 100 {
		if _, err := os.ReadFile(filepath.Join(dir, "file")); err != nil {
			t.Fatal(err)
		}
	}
	if after := descriptors(t); after > before+15 {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func testLseek(t *testing.T, dir string) {
	fd := open(t, filepath.Join(dir, "large"), unix.O_RDONLY)
	if off, err := unix.Seek(fd, largeSize/2, unix.SEEK_HOLE); off != largeSize || err != nil {
		t.Errorf("SEEK_HOLE: %d, %v", off, err)
	}
	if off, err := unix.Seek(fd, largeSize/2, unix.SEEK_DATA); off != largeSize/2 || err != nil {
		t.Errorf("SEEK_DATA: %d, %v", off, err)
	}
	for _, off := range []int64{largeSize, largeSize + 1} {
		_, err := unix.Seek(fd, off, unix.SEEK_DATA)
		expect(t, "SEEK_DATA behind the end", err, unix.ENXIO)
		_, err = unix.Seek(fd, off, unix.SEEK_HOLE)
		expect(t, "SEEK_HOLE behind the end", err, unix.ENXIO)
	}
	_, err := unix.Seek(fd, -1, io.SeekStart)
	expect(t, "before the begin", err, unix.EINVAL)
}

func testHole(t *testing.T, dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "hole"))
	if err != nil || len(b) != holeSize || !bytes.Equal(b, make([]byte, holeSize)) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func testDirectIO(t *testing.T, dir string) {
	fd := open(t, filepath.Join(dir, "large"), unix.O_RDONLY|unix.O_DIRECT)
	buf, err := unix.Mmap(-1, 0, 2<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(buf) }()
	var got []byte
	for len(got) < largeSize { // the rest behind whole blocks may take a read of its own
		n, err := unix.Pread(fd, buf, int64(len(got)))
		if n <= 0 || err != nil {
			t.Fatalf("%d bytes at %d, %v", n, len(got), err)
		}
		got = append(got, buf[:n]...)
	}
	if !bytes.Equal(got, content) {
		t.Errorf("%d other bytes", len(got))
	}
}

func testMmap(t *testing.T, dir string) {
	fd := open(t, filepath.Join(dir, "large"), unix.O_RDONLY)
	for _, kind := range []int{unix.MAP_SHARED, unix.MAP_PRIVATE} {
		b, err := unix.Mmap(fd, 0, largeSize, unix.PROT_READ, kind)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, content) {
			t.Errorf("kind %d: other bytes", kind)
		}
		if err := unix.Munmap(b); err != nil {
			t.Error(err)
		}
	}
}

// testOffsets reads pieces that are not whole pages.
func testOffsets(t *testing.T, dir string) {
	fd := open(t, filepath.Join(dir, "large"), unix.O_RDONLY)
	for _, p := range [][2]int{{0, 1}, {1, 4096}, {4095, 2}, {65535, 131074}, {largeSize - 10, 100}, {largeSize - 1, 1}, {largeSize, 10}, {largeSize + 5000, 10}} {
		b := make([]byte, p[1])
		n, err := unix.Pread(fd, b, int64(p[0]))
		want := content[min(p[0], largeSize):min(p[0]+p[1], largeSize)]
		if err != nil || !bytes.Equal(b[:n], want) {
			t.Errorf("%d bytes at %d: %d, %v, want %d", p[1], p[0], n, err, len(want))
		}
	}
}

func testXAttr(t *testing.T, dir string) {
	path := filepath.Join(dir, "file")
	b := make([]byte, 100)
	n, err := unix.Getxattr(path, xattr, b)
	if err != nil || string(b[:n]) != text {
		t.Errorf("%q, %v", b[:max(n, 0)], err)
	}
	if n, err := unix.Listxattr(path, b); err != nil || string(b[:n]) != xattr+"\x00" {
		t.Errorf("list: %q, %v", b[:max(n, 0)], err)
	}
	_, err = unix.Getxattr(path, xattr, b[:1])
	expect(t, "a short buffer", err, unix.ERANGE)
	_, err = unix.Getxattr(path, "user.none", b)
	expect(t, "no such attribute", err, unix.ENODATA)
}

func testLocks(t *testing.T, dir string) {
	fd := open(t, filepath.Join(dir, "file"), unix.O_RDONLY)
	other := open(t, filepath.Join(dir, "file"), unix.O_RDONLY)
	expect(t, "flock", unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB), nil)
	expect(t, "flock of another", unix.Flock(other, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
	read := unix.Flock_t{Type: unix.F_RDLCK}
	expect(t, "read lock", unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &read), nil)
	write := unix.Flock_t{Type: unix.F_WRLCK}
	expect(t, "write lock", unix.FcntlFlock(uintptr(other), unix.F_OFD_SETLK, &write), unix.EBADF)
}

func testStatfs(t *testing.T, dir string) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Flags&unix.ST_RDONLY == 0 || st.Bsize == 0 || st.Namelen != 255 {
		t.Errorf("%+v, %v", st, err)
	}
}
