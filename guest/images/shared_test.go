package images

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	manifest := digest.FromString("x")
	dir, empty := t.TempDir(), t.TempDir()
	file := filepath.Join(dir, sharedimages.Name(manifest))
	check(t, os.WriteFile(file, nil, 0o600))
	flat := filepath.Join(empty, "flat")
	check(t, os.WriteFile(flat, nil, 0o600))
	loop := filepath.Join(empty, "loop")
	check(t, os.Symlink(loop, loop))
	for name, tc := range map[string]struct {
		dirs    []string
		found   bool
		is      func(error) bool
		noShare bool
	}{
		"none at all":  {nil, false, errdefs.IsNotFound, true},
		"none here":    {[]string{"/none/at/all", flat + "/x"}, false, errdefs.IsNotFound, true},
		"empty":        {[]string{"/none/at/all", empty}, false, errdefs.IsNotFound, false},
		"second":       {[]string{"/none/at/all", empty, dir}, true, nil, false},
		"out of order": {[]string{"/none/at/all", loop}, false, errdefs.IsUnavailable, false},
		"third":        {[]string{loop, empty, dir}, true, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &shared{dirs: tc.dirs}
			got, err := s.find(t.Context(), manifest)
			if tc.found && (got != file || err != nil) || !tc.found && (got != "" || !tc.is(err) || errors.Is(err, errNoShare) != tc.noShare) {
				t.Errorf("%q, %v", got, err)
			}
			if n := s.busy.Load(); n != 0 {
				t.Errorf("%d threads are counted", n)
			}
		})
	}
}

// TestSharedSource reads an image through a store whose first source is the
// node's file.
func TestSharedSource(t *testing.T) {
	img := storetest.NewImage("image", storetest.Units(1, 3<<20), storetest.Files(2, 100_000, 5, 300_000, 0, 70_000))
	for name, tc := range map[string]struct {
		change func(t *testing.T, path string)
		shared bool // it gives all bytes
		wrong  bool // some of them
	}{
		"good":    {change: func(*testing.T, string) {}, shared: true},
		"altered": {change: func(t *testing.T, path string) { flip(t, path, len(img.Plain)/2) }, wrong: true},
		"larger":  {change: func(t *testing.T, path string) { check(t, os.Truncate(path, int64(len(img.Plain)+4096))) }},
		"missing": {change: func(t *testing.T, path string) { check(t, os.Remove(path)) }},
		"link": {change: func(t *testing.T, path string) {
			check(t, os.Rename(path, path+".moved"))
			check(t, os.Symlink(path+".moved", path))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, sharedimages.Name(img.Index.Manifest))
			check(t, os.WriteFile(path, img.Plain, 0o600))
			tc.change(t, path)
			s, err := store.Open(store.Config{Dir: t.TempDir()})
			check(t, err)
			defer s.Close()
			relay := storetest.NewSource("relay", img)
			shared := &sharedSource{files: &shared{dirs: []string{"/none", dir}}, manifest: img.Index.Manifest, size: img.Index.Size(), trust: TrustImage}
			i, err := s.OpenImage(t.Context(), img.Index, []store.Source{shared, relay})
			check(t, err)
			defer i.Close()
			got := make([]byte, i.Size())
			if _, err := i.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, img.Plain) {
				t.Fatalf("read: %v", err)
			}
			st := s.Stats()
			if asked := len(relay.Requests()); (asked == 0) != tc.shared || (st.VerifyFailures > 0) != tc.wrong {
				t.Errorf("%d requests of the relay, %d wrong chunks: %+v", asked, st.VerifyFailures, st.Sources)
			}
			check(t, i.Close())
			for n := 0; shared.files.busy.Load() > 0; n++ {
				if n > 1000 {
					t.Fatalf("%d threads are left", shared.files.busy.Load())
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
}

func flip(t *testing.T, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	for i := range 1 << 16 {
		b[at+i] ^= 1
	}
	check(t, os.WriteFile(path, b, 0o600))
}

// heldFile is an image whose reads wait, or fail.
type heldFile struct {
	size int64
	wait <-chan struct{}
	err  error
}

func (f heldFile) Size() int64 { return f.size }

func (f heldFile) ReadAt(ctx context.Context, p []byte, _ int64) (int, error) {
	select {
	case <-f.wait:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return len(p), f.err
}

// serveHeld shows a file over FUSE, as virtio-fs would.
func serveHeld(t *testing.T, name string, f imagefs.File) (dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE")
	}
	s, err := session.Open(session.Config{Dir: filepath.Join(t.TempDir(), "fuse")})
	check(t, err)
	link, err := s.Attach()
	check(t, err)
	srv, err := imagefs.New(imagefs.Config{Link: link, Offer: link.Offer()})
	check(t, err)
	check(t, srv.Add(imagefs.Node{ID: 2, Name: name, File: f}))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, link.Close(), s.Close()); err != nil {
			t.Error(err)
		}
	})
	return link.Dir()
}

// A file system that does not answer holds up nobody whose context ends, and
// many such questions are no more than so many threads.
func TestSharedSourceWithoutAnAnswer(t *testing.T) {
	img := storetest.NewImage("image", storetest.Units(1, 1<<20))
	answer := make(chan struct{})
	dir := serveHeld(t, sharedimages.Name(img.Index.Manifest), heldFile{size: img.Index.Size(), wait: answer})
	files := &shared{dirs: []string{dir}}
	s := &sharedSource{files: files, manifest: img.Index.Manifest, size: img.Index.Size(), trust: TrustImage}
	ctx, cancel := context.WithCancel(t.Context())
	var bodies []io.ReadCloser
	for range maxBusy {
		b, err := s.Fetch(ctx, &img.Index.Segments[0], 0, 4096)
		check(t, err)
		bodies = append(bodies, b)
	}
	if _, err := s.Fetch(ctx, &img.Index.Segments[0], 0, 4096); !errdefs.IsUnavailable(err) {
		t.Errorf("one more: %v", err)
	}
	time.AfterFunc(10*time.Millisecond, cancel)
	for _, b := range bodies {
		if n, err := b.Read(make([]byte, 10)); n != 0 || !errors.Is(err, context.Canceled) {
			t.Errorf("%d bytes, %v", n, err)
		}
		check(t, b.Close())
	}
	close(answer)
	for files.busy.Load() > 0 {
		time.Sleep(time.Millisecond)
	}
}

func TestSharedSourceFails(t *testing.T) {
	img := storetest.NewImage("image", storetest.Units(1, 1<<20))
	answer := make(chan struct{})
	close(answer)
	dir := serveHeld(t, sharedimages.Name(img.Index.Manifest), heldFile{size: img.Index.Size(), wait: answer, err: errdefs.ErrUnavailable})
	s := &sharedSource{files: &shared{dirs: []string{dir}}, manifest: img.Index.Manifest, size: img.Index.Size(), trust: TrustImage}
	b, err := s.Fetch(t.Context(), &img.Index.Segments[0], 0, 4096)
	check(t, err)
	defer b.Close()
	if _, err := io.ReadAll(b); !errdefs.IsUnavailable(err) || !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "at ") {
		t.Errorf("read: %v", err)
	}
}
