package daemon

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// What an image of these tests has: layers of files of noise.
const (
	layers   = 2
	files    = 12 // of a layer
	fileSize = 384 << 10
)

// image is one in the node's registry.
type image struct {
	ref      string
	manifest digest.Digest
	chain    []digest.Digest // chain IDs, the lowest first
	seed     uint64
	sums     [][sha256.Size]byte // of the files
}

func (i image) top() string { return i.chain[len(i.chain)-1].String() }

func noise(seed uint64) string {
	b := make([]byte, fileSize)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b) // has no error
	return string(b)
}

// name and seed of a file of an image.
func (i image) file(n int) (name string, seed uint64) {
	return fmt.Sprintf("f%02d", n), i.seed<<8 + uint64(n)
}

// push adds an image to the registry, of which a node has all when it is prepared.
func (h *host) push(name string, seed uint64) image {
	return h.pushAs(name, seed, files, func(tarball []byte) (registrytest.Layer, error) {
		return registrytest.GzipLevel(tarball, gzip.BestSpeed)
	})
}

// pushSlow adds an image with one file in each layer, of which a file is fetched when it is read, which takes
// the registry slowness.
func (h *host) pushSlow(name string, seed uint64) image {
	return h.pushAs(name, seed, files, func(tarball []byte) (registrytest.Layer, error) { return registrytest.EStargz(tarball) })
}

const slowness = time.Second

func (h *host) pushAs(name string, seed uint64, files int, compress func([]byte) (registrytest.Layer, error)) image {
	h.t.Helper()
	i := image{ref: h.reg.Host() + "/" + name + ":v1", seed: seed}
	var pushed registrytest.Image
	var ids []digest.Digest
	for n := range layers {
		var entries []registrytest.Entry
		for m := range files {
			name, seed := i.file(n*files + m)
			content := noise(seed)
			entries = append(entries, registrytest.File(name, 0o644, content))
			i.sums = append(i.sums, sha256.Sum256([]byte(content)))
		}
		l := registrytest.Must(compress(registrytest.Must(registrytest.Tar(entries...))))
		pushed.Layers, ids = append(pushed.Layers, l), append(ids, l.DiffID)
	}
	i.manifest = h.reg.PushImage(name, "v1", pushed).Desc.Digest
	i.chain = identity.ChainIDs(ids)
	return i
}

// pull does what containerd's unpacker does for a snapshotter that is remote
// (topHalf in its core/unpack/unpacker.go), with the labels of CRI
// (pkg/snapshotters/annotations.go). Each layer has to be there already.
func (s *client) pull(i image) {
	s.t.Helper()
	for n := range i.chain {
		_, err := again(func() error { _, err := s.prepareLayer(i, n); return err })
		if !errdefs.IsAlreadyExists(err) {
			s.t.Fatalf("prepare layer %d: %v, want that it already exists", n, err)
		}
		_, err = again(func() error { _, err := s.Stat(s.ctx(), i.chain[n].String()); return err })
		check(s.t, err)
	}
}

func (s *client) prepareLayer(i image, n int) ([]mount.Mount, error) {
	parent := ""
	if n > 0 {
		parent = i.chain[n-1].String()
	}
	chain := i.chain[n].String()
	return s.Prepare(s.ctx(), fmt.Sprintf("k8s.io/%d/extract-%d %s", n, n, chain), parent, snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: chain, snapshotters.TargetRefLabel: i.ref, snapshotters.TargetManifestDigestLabel: i.manifest.String(),
	}))
}

// run makes the snapshot of a container.
func (s *client) run(key string, i image) []mount.Mount {
	s.t.Helper()
	var mounts []mount.Mount
	_, err := again(func() (err error) { mounts, err = s.Prepare(s.ctx(), key, i.top()); return err })
	check(s.t, err)
	return mounts
}

// container mounts the snapshot of a container, as containerd does for runc, and
// returns where.
func (h *host) container(key string, s *client, i image) string {
	h.t.Helper()
	return h.mountHere(key, s.run(key, i))
}

func (h *host) mountHere(key string, mounts []mount.Mount) string {
	h.t.Helper()
	root := filepath.Join(h.dir, "containers", key)
	must(h.t, os.MkdirAll(root, 0o700), mount.All(mounts, root))
	h.t.Cleanup(func() { _ = mount.UnmountAll(root, unix.MNT_DETACH) }) // again, when the test has failed
	return root
}

func (h *host) unmountHere(key string) {
	h.t.Helper()
	check(h.t, mount.UnmountAll(filepath.Join(h.dir, "containers", key), 0))
}

// verify reads a file of an image, all of it from where it is kept, compares,
// and drops it from the page cache.
func (i image) verify(root string, n int) error {
	name, _ := i.file(n)
	f, err := os.Open(filepath.Join(root, name))
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if [sha256.Size]byte(h.Sum(nil)) != i.sums[n] {
		return fmt.Errorf("%s is not as in the image", f.Name())
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func (i image) verifyAll(t *testing.T, root string) {
	t.Helper()
	for n := range layers * files {
		check(t, i.verify(root, n))
	}
}

// readers read an image over and over.
type readers struct {
	t     *testing.T
	files atomic.Int64 // that were read
	end   context.CancelFunc
	wg    sync.WaitGroup

	mu  sync.Mutex
	err error // protected by mu
}

// pause of a reader between two files: what is tested needs the processor, too.
const pause = 30 * time.Millisecond

// startReaders begins to read; finish it before anything is unmounted.
func (i image) startReaders(t *testing.T, root string, parallel int) *readers {
	ctx, end := context.WithCancel(t.Context())
	r := &readers{t: t, end: end}
	for p := range parallel {
		r.wg.Go(func() {
			for n := p * 5; ctx.Err() == nil; n++ {
				if err := i.verify(root, n%(layers*files)); err != nil {
					r.mu.Lock()
					r.err = errors.Join(r.err, err)
					r.mu.Unlock()
					return
				}
				r.files.Add(1)
				time.Sleep(pause)
			}
		})
	}
	return r
}

func (r *readers) failed() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// progress waits until n more files were read.
func (r *readers) progress(n int64) {
	r.t.Helper()
	want := r.files.Load() + n
	eventually(r.t, "readers go on", func() bool {
		if err := r.failed(); err != nil {
			r.t.Fatalf("a read failed: %v", err)
		}
		return r.files.Load() >= want
	})
}

func (r *readers) finish() {
	r.t.Helper()
	r.end()
	done := make(chan struct{})
	go func() { r.wg.Wait(); close(done) }()
	eventually(r.t, "readers end", func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	check(r.t, r.failed())
}

func dialUnix(path string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience/6)
	defer cancel()
	return new(net.Dialer).DialContext(ctx, "unix", path)
}

// slow makes containers whose images are fetched while they are read.
type slow struct {
	h       *host
	s       *client
	mount   func(key string, mounts []mount.Mount) (root string)
	unmount func(key string)
	n       int // containers so far
}

// during does something while a read waits for the registry. The read has to
// succeed.
func (w *slow) during(what string, do func()) {
	w.h.t.Helper()
	w.n++
	key := fmt.Sprintf("slow%d", w.n)
	img := w.h.pushSlow(key, uint64(100+w.n))
	w.s.pull(img)
	root := w.mount(key, w.s.run(key, img))
	defer w.h.reg.Fault("/"+key+"/blobs/", 0, registrytest.Delay(slowness))()
	before := len(w.h.reg.Requests("/" + key + "/blobs/"))
	read := make(chan error, 1)
	go func() { read <- img.verify(root, 0) }()
	eventually(w.h.t, "the registry is asked for a file", func() bool { return len(w.h.reg.Requests("/"+key+"/blobs/")) > before })
	do()
	select {
	case err := <-read:
		if err != nil {
			w.h.t.Errorf("read during %s: %v", what, err)
		}
	case <-time.After(patience):
		w.h.t.Fatalf("a read hangs since %s", what)
	}
	w.unmount(key)
	w.s.remove(key)
	w.s.removeImage(img)
}
