package mount

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

func TestMain(m *testing.M) {
	if os.Getenv(workerEnv) != "" {
		os.Exit(workerMain())
	}
	os.Exit(m.Run())
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE, EROFS and overlay")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("needs mkfs.erofs (erofs-utils)")
	}
}

// testImage is an EROFS image made by mkfs.erofs and what its files hold.
type testImage struct {
	path     string
	manifest digest.Digest
	size     int64
	sums     map[string][sha256.Size]byte // by relative path
	bytes    int64                        // of file content
}

// makeImage builds an image of small files of up to 64 KiB and one of large
// bytes. Different seeds give different images.
func makeImage(t testing.TB, seed uint64, files int, large int64) *testImage {
	t.Helper()
	needRoot(t)
	tree := filepath.Join(t.TempDir(), "tree")
	img := &testImage{
		path:     filepath.Join(t.TempDir(), "image.erofs"),
		manifest: digest.FromString(fmt.Sprint(seed)),
		sums:     make(map[string][sha256.Size]byte),
	}
	rnd := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	write := func(name string, n int64) {
		b := make([]byte, n)
		_, _ = rnd.Read(b)
		path := filepath.Join(tree, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, b, 0o644))
		img.sums[name] = sha256.Sum256(b)
		img.bytes += n
	}
	for i := range files {
		write(fmt.Sprintf("d%d/f%d", i%20, i), int64(rnd.Uint64()%(64<<10)))
	}
	if large > 0 {
		write("large", large)
	}
	check(t, os.MkdirAll(tree, 0o755))
	check(t, os.Chmod(tree, 0o751))
	if out, err := exec.Command("mkfs.erofs", "--quiet", "-T1000000000", img.path, tree).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v: %s", err, out)
	}
	st, err := os.Stat(img.path)
	check(t, err)
	img.size = st.Size()
	return img
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// diskFile serves an image from a file, with delays and failures on demand.
type diskFile struct {
	f      *os.File
	size   int64
	delay  time.Duration
	reads  atomic.Int64
	fail   atomic.Pointer[error]                 // returned by every read
	before atomic.Pointer[func(context.Context)] // called by every read
	closed atomic.Bool
}

func openDisk(path string) (*diskFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &diskFile{f: f, size: st.Size()}, nil
}

func (d *diskFile) Size() int64  { return d.size }
func (d *diskFile) Close() error { d.closed.Store(true); return d.f.Close() }

func (d *diskFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	d.reads.Add(1)
	if err := d.fail.Load(); err != nil && *err != nil {
		return 0, *err
	}
	if f := d.before.Load(); f != nil && *f != nil {
		(*f)(ctx)
	}
	if d.delay > 0 {
		select {
		case <-time.After(d.delay):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return d.f.ReadAt(p, off)
}

// local is a mounter with its session in this process.
type local struct {
	*Mounter
	t       testing.TB
	session *session.Session
	dir     string
	stop    func() error
}

func newLocal(t testing.TB, cfg Config) *local {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "mnt") //nolint:usetesting // not on a file system that a test mounts, and short
	check(t, err)
	s, err := session.Open(session.Config{Dir: filepath.Join(dir, "session")})
	check(t, err)
	link, err := s.Attach()
	check(t, err)
	cfg.StateDir, cfg.Link = filepath.Join(dir, "state"), link
	m, err := New(cfg)
	check(t, err)
	check(t, m.Restore(t.Context(), func(Record) (File, error) { return nil, errors.New("nothing to restore") }))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx) }()
	l := &local{Mounter: m, t: t, session: s, dir: dir}
	l.stop = sync.OnceValue(func() error {
		uctx, ucancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer ucancel()
		err := m.UnmountAll(uctx)
		cancel()
		return errors.Join(err, <-done, link.Close(), s.Close(), os.RemoveAll(dir))
	})
	t.Cleanup(func() {
		if err := l.stop(); err != nil && !errors.Is(err, session.ErrEnded) {
			t.Error(err)
		}
	})
	return l
}

// mount mounts an image and returns its file and record.
func (l *local) mount(img *testImage, id string, change ...func(*Spec)) (*diskFile, Record) {
	l.t.Helper()
	f, err := openDisk(img.path)
	check(l.t, err)
	spec := Spec{ID: id, Reference: "test/" + id, Manifest: img.manifest, Image: f, Target: filepath.Join(l.dir, "target-"+id)}
	for _, c := range change {
		c(&spec)
	}
	rec, err := l.Mount(l.t.Context(), spec)
	check(l.t, err)
	return f, rec
}

// verify reads a whole tree and compares every byte.
func (img *testImage) verify(t testing.TB, root string) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		seen++
		return img.verifyFile(root, rel)
	})
	check(t, err)
	if seen != len(img.sums) {
		t.Fatalf("%s has %d files, the image %d", root, seen, len(img.sums))
	}
}

// verifyFile compares one file and drops it from the page cache again.
func (img *testImage) verifyFile(root, rel string) error {
	f, err := os.Open(filepath.Join(root, rel))
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if want, ok := img.sums[rel]; !ok || [sha256.Size]byte(h.Sum(nil)) != want {
		return fmt.Errorf("%s differs from the image", rel)
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// names lists the files of an image.
func (img *testImage) names() []string {
	var names []string
	for name := range img.sums {
		names = append(names, name)
	}
	return names
}

// dropCaches makes the next reads cold.
func dropCaches(t testing.TB) {
	t.Helper()
	check(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

// eventually waits for a condition that the kernel brings about by itself.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited in vain: %s", what)
}

// bothPaths runs a test for each way to mount that this kernel has.
func bothPaths(t *testing.T, f func(t *testing.T, p Path)) {
	works, err := newLocal(t, Config{}).Paths(t.Context())
	check(t, err)
	for _, p := range []Path{FilePath, LoopPath} {
		t.Run(string(p), func(t *testing.T) {
			if !slices.Contains(works, p) {
				t.Skipf("needs a kernel that mounts images by %s, this one: %v", p, works)
			}
			f(t, p)
		})
	}
}
