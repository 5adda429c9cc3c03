package passthrough

import (
	"errors"
	"io"
	"log"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"
)

// kernelFS lets this machine's kernel be the guest: FUSE through /dev/fuse, with data
// that takes the way of a device's.
type kernelFS struct{ *FS }

func (k kernelFS) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, errno := k.ReadV(in, [][]byte{buf[:len(buf)/2], buf[len(buf)/2:]}, true)
	return fuse.ReadResultData(buf[:n]), fuse.Status(errno)
}

func (k kernelFS) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n, errno := k.WriteV(in, [][]byte{data})
	return uint32(n), fuse.Status(errno)
}

// needRoot skips where the tests cannot mount and change owners.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount and to change owners")
	}
	if err := unix.Access("/dev/fuse", unix.R_OK|unix.W_OK); err != nil {
		t.Skip("needs /dev/fuse")
	}
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// open makes a FS of a directory until the test ends.
func open(t testing.TB, dir string, o Options) *FS {
	t.Helper()
	root, err := os.Open(dir)
	must(t, err)
	f, err := New(root, o)
	must(t, err, root.Close())
	t.Cleanup(func() { must(t, f.Close()) })
	return f
}

// mount shows a new directory at another one, until the test ends.
func mount(t *testing.T, o Options, capabilities uint64) (host, guest string) {
	t.Helper()
	needRoot(t)
	base := t.TempDir()
	must(t, os.Chmod(base, 0o755))
	host, guest = filepath.Join(base, "host"), filepath.Join(base, "guest")
	must(t, os.Mkdir(host, 0o755), os.Mkdir(guest, 0o755))
	f := open(t, host, o)
	srv, err := fuse.NewServer(kernelFS{f}, guest, &fuse.MountOptions{
		AllowOther: true, Options: []string{"default_permissions"}, DirectMountStrict: true, DirectMountFlags: unix.MS_NODEV,
		MaxWrite: 1 << 20, Logger: log.New(io.Discard, "", 0), DisableSplice: true,
		ExtraCapabilities:    fuse.CAP_READDIRPLUS_AUTO | capabilities,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH,
	})
	must(t, err)
	go srv.Serve()
	must(t, srv.WaitMount())
	t.Cleanup(func() {
		must(t, srv.Unmount())
		srv.Wait()
	})
	return host, guest
}

// The POSIX tests of go-fuse, for each mode of caching.
func TestPOSIX(t *testing.T) {
	skip := map[string]string{
		"FcntlFlockLocksFile": "go-fuse does not run it itself: it must be fixed",
		"Tmpfile":             "files without a name are not served, see TestNoTmpfile",
	}
	for _, cache := range []Cache{CacheNever, CacheAuto, CacheMetadata, CacheAlways} {
		t.Run(string(cache), func(t *testing.T) {
			_, guest := mount(t, Options{Cache: cache, XAttr: true}, 0)
			for name, test := range posixtest.All {
				if skip[name] != "" {
					continue
				}
				t.Run(name, func(t *testing.T) {
					dir := filepath.Join(guest, name)
					must(t, os.Mkdir(dir, 0o755))
					test(t, dir)
				})
			}
		})
	}
}

// A file without a name is refused as file systems refuse it that have none: programs
// then make one with a name.
func TestNoTmpfile(t *testing.T) {
	_, guest := mount(t, Options{Cache: CacheAuto}, 0)
	fd, err := unix.Open(guest, unix.O_TMPFILE|unix.O_RDWR, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	if !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatalf("open with O_TMPFILE: %v, want EOPNOTSUPP", err)
	}
}
