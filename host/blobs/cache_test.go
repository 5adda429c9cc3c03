package blobs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

const name = "library/app"

// rig is a cache and a registry.
type rig struct {
	*Cache
	reg    *registrytest.Server
	client *registry.Client
	log    *bytes.Buffer
}

func newRig(t *testing.T, size int64) *rig {
	t.Helper()
	g := &rig{reg: registrytest.Start(t, registrytest.Options{}), log: new(bytes.Buffer)}
	g.client = registry.New(registry.Config{RetryMax: -1, Stall: 10 * time.Second})
	t.Cleanup(func() { _ = g.client.Close() }) // never fails
	g.open(t, t.TempDir(), size)
	return g
}

func (g *rig) open(t *testing.T, dir string, size int64) {
	t.Helper()
	c, err := Open(Config{Dir: dir, Size: size, Log: slog.New(slog.NewTextHandler(g.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	g.Cache = c
	t.Cleanup(func() { _ = c.Close() }) // never fails
}

// repo is the repository as one more caller sees it.
func (g *rig) repo(t *testing.T) *registry.Repository {
	t.Helper()
	named, err := reference.ParseNormalizedNamed(g.reg.Host() + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return g.client.Repository(named)
}

func (g *rig) push(seed byte, n int) (ocispec.Descriptor, []byte) {
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(data) // never fails
	return g.reg.PushBlob(name, "application/octet-stream", data), data
}

func (g *rig) read(t *testing.T, desc ocispec.Descriptor, off, n int64) ([]byte, error) {
	t.Helper()
	body, err := g.Open(t.Context(), g.repo(t), desc, off, n)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

func (g *rig) want(t *testing.T, desc ocispec.Descriptor, data []byte, off, n int64) {
	t.Helper()
	got, err := g.read(t, desc, off, n)
	if err != nil || !bytes.Equal(got, data[off:off+n]) {
		t.Fatalf("[%d,%d): %d bytes, right: %v, %v", off, off+n, len(got), bytes.Equal(got, data[off:off+n]), err)
	}
}

// settle waits for downloads to end.
func (g *rig) settle(t *testing.T) {
	t.Helper()
	done := make(chan struct{})
	go func() { g.fills.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("a download does not end")
	}
}

func TestOneDownload(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(1, 6<<20)
	g.reg.Fault(desc.Digest.String(), 0, registrytest.Slow(256<<20))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if i%2 == 0 {
				g.want(t, desc, data, 0, desc.Size)
				return
			}
			for off := int64(0); off < desc.Size; off += 4 << 20 { // as parallel clients do
				g.want(t, desc, data, off, min(4<<20, desc.Size-off))
			}
		})
	}
	wg.Wait()
	g.settle(t)
	g.want(t, desc, data, 7, 1<<20)
	if got := g.reg.BlobStats(desc.Digest).Bytes; got != desc.Size {
		t.Errorf("the registry sent %d bytes for one blob of %d", got, desc.Size)
	}
	before := g.reg.BlobStats(desc.Digest).Bytes
	dir := g.cfg.Dir
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g.open(t, dir, 1<<30)
	g.want(t, desc, data, 0, desc.Size)
	if got := g.reg.BlobStats(desc.Digest).Bytes; got != before {
		t.Errorf("after a restart %d more bytes were sent", got-before)
	}
}

func TestSmallRanges(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(2, 16<<20)
	for _, off := range []int64{0, 1 << 20, 9 << 20} {
		g.want(t, desc, data, off, 64<<10)
	}
	if s := g.Stats(); s.Downloads != 0 || s.Passed != 3 || s.Used != 0 {
		t.Errorf("%+v, want 3 requests passed on", s)
	}
	if got := g.reg.BlobStats(desc.Digest).Bytes; got > 1<<20 {
		t.Errorf("the registry sent %d bytes for three small ranges", got)
	}
	small, data := g.push(3, 1000)
	g.want(t, small, data, 0, 1000)
	g.want(t, small, data, 10, 20)
	g.settle(t)
	if s := g.Stats(); s.Downloads != 1 || s.Blobs != 1 {
		t.Errorf("%+v, want the small blob", s)
	}
}

// A range far ahead of a download does not wait for it.
func TestFarAhead(t *testing.T) {
	g := newRig(t, 1<<30)
	g.ahead = 1 << 20
	desc, data := g.push(4, 16<<20)
	free := make(chan struct{})
	slow := origin{g.repo(t), func(off int64) { <-free }}
	body, err := g.Open(t.Context(), slow, desc, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	g.want(t, desc, data, 15<<20, 64<<10)
	if s := g.Stats(); s.Passed != 1 || s.Downloads != 1 {
		t.Errorf("%+v", s)
	}
	close(free)
	if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// origin is a repository whose requests can be held up.
type origin struct {
	*registry.Repository
	before func(off int64)
}

func (o origin) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	o.before(0)
	return o.Repository.Open(ctx, desc)
}

func (o origin) Range(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	o.before(off)
	return o.Repository.Range(ctx, d, off, n)
}

func TestWrongBytes(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(5, 3<<20)
	remove := g.reg.Fault(desc.Digest.String(), 0, registrytest.Corrupt(100))
	got, err := g.read(t, desc, 0, desc.Size)
	if !errdefs.IsDataLoss(err) || int64(len(got)) == desc.Size {
		t.Fatalf("%d bytes, error %v, want ErrDataLoss before the end", len(got), err)
	}
	g.settle(t)
	if files, _ := os.ReadDir(g.cfg.Dir); len(files) != 0 || g.Stats().Used != 0 {
		t.Errorf("left on the disk: %v, %+v", files, g.Stats())
	}
	if !bytes.Contains(g.log.Bytes(), []byte("wrong bytes")) {
		t.Errorf("not in the log: %s", g.log)
	}
	remove()
	g.want(t, desc, data, 0, desc.Size)
}

// A download that fails is gone on with by the next reader, from where it stood.
func TestGoesOn(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(6, 3<<20)
	remove := g.reg.Fault(desc.Digest.String(), 1, registrytest.Truncate(2<<20))
	first, err := g.Open(t.Context(), g.repo(t), desc, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if got, err := io.ReadAll(first); err == nil || !bytes.Equal(got, data[:len(got)]) || len(got) == 0 {
		t.Fatalf("%d bytes, error %v", len(got), err)
	}
	g.settle(t)
	remove()
	sent := g.reg.BlobStats(desc.Digest).Bytes
	g.want(t, desc, data, 0, desc.Size)
	if more := g.reg.BlobStats(desc.Digest).Bytes - sent; more > desc.Size-1<<20 {
		t.Errorf("%d bytes were fetched again", more)
	}
}

// Who waits for the download of another caller, whose rights end, goes on with its
// own.
func TestOwnRights(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(7, 2<<20)
	joined := make(chan struct{})
	var refused atomic.Int64
	denied := refusing{g.repo(t), func() error { <-joined; refused.Add(1); return errdefs.ErrUnauthenticated }}
	first, err := g.Open(t.Context(), denied, desc, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := g.Open(t.Context(), g.repo(t), desc, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	close(joined)
	if got, err := io.ReadAll(second); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the second reader got %d bytes, %v", len(got), err)
	}
	if refused.Load() != 1 {
		t.Errorf("%d refusals", refused.Load())
	}
}

type refusing struct {
	*registry.Repository
	err func() error
}

func (r refusing) Open(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
	return nil, r.err()
}

func TestEviction(t *testing.T) {
	g := newRig(t, 5<<20)
	var descs []ocispec.Descriptor
	var datas [][]byte
	for i := range 4 {
		desc, data := g.push(byte(10+i), 2<<20)
		descs, datas = append(descs, desc), append(datas, data)
	}
	g.want(t, descs[0], datas[0], 0, 2<<20)
	g.want(t, descs[1], datas[1], 0, 2<<20)
	g.settle(t)
	g.want(t, descs[0], datas[0], 5, 10) // now 1 is the older one
	g.want(t, descs[2], datas[2], 0, 2<<20)
	g.settle(t)
	if g.has(descs[1]) || !g.has(descs[0]) || !g.has(descs[2]) {
		t.Error("not the least recently used one went")
	}
	// Both are being read: nothing goes, and the next one is passed on.
	for _, d := range []ocispec.Descriptor{descs[0], descs[2]} {
		body, err := g.Open(t.Context(), g.repo(t), d, 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
	}
	g.want(t, descs[3], datas[3], 0, 2<<20)
	if s := g.Stats(); g.has(descs[3]) || s.Used > 5<<20 || s.Evicted != 1 {
		t.Errorf("%+v", s)
	}
	big, data := g.push(20, 6<<20) // more than there ever can be
	g.want(t, big, data, 0, 6<<20)
	if g.has(big) {
		t.Error("a blob larger than the cache is kept")
	}
}

// key is that of a blob of the rig's registry.
func (g *rig) key(d digest.Digest) key { return keyOf(host(g.reg.Host()), d) }

// host is an Origin that is not asked for anything.
type host string

func (h host) Host() string { return string(h) }

func (host) Open(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
	return nil, errdefs.ErrPermissionDenied
}

func (host) Range(context.Context, digest.Digest, int64, int64) (io.ReadCloser, error) {
	return nil, errdefs.ErrPermissionDenied
}

func (g *rig) has(d ocispec.Descriptor) bool {
	_, err := os.Stat(g.name(g.key(d.Digest)))
	return err == nil
}

// What nobody reads any more is not downloaded to its end.
func TestAbandoned(t *testing.T) {
	g := newRig(t, 1<<30)
	g.linger = time.Millisecond
	desc, data := g.push(8, 8<<20)
	remove := g.reg.Fault(desc.Digest.String(), 0, registrytest.Stall(1<<20, time.Minute))
	body, err := g.Open(t.Context(), g.repo(t), desc, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	body.Close()
	g.settle(t)
	if s := g.Stats(); s.Used != 0 {
		t.Errorf("%+v", s)
	}
	remove()
	g.want(t, desc, data, 0, desc.Size)
}

// A disk without room is no reason for a reader to fail.
func TestNoRoomOnDisk(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(9, 3<<20)
	full := filepath.Join(g.cfg.Dir, filepath.Base(g.name(g.key(desc.Digest)))+partial)
	if err := os.Symlink("/dev/full", full); err != nil {
		t.Fatal(err)
	}
	g.want(t, desc, data, 0, desc.Size)
	g.settle(t)
	if s := g.Stats(); s.Used != 0 || !bytes.Contains(g.log.Bytes(), []byte("make room")) {
		t.Errorf("%+v, log %s", s, g.log)
	}
}

func TestRestore(t *testing.T) {
	g := newRig(t, 1<<30)
	dir := t.TempDir()
	d := digest.FromString("x")
	name := filepath.Base(g.name(g.key(d)))
	for name, content := range map[string]string{
		name:                             "x",
		name + partial:                   "x",
		"sha256-" + d.Encoded():          "x",
		"sha256-00-" + g.key(d).registry: "short",
		"sha256-" + d.Encoded() + "-00":  "x",
		"md5-d41d8cd98f00b204e9800998ecf8427e-" + g.key(d).registry: "",
		"other": "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	g.open(t, dir, 1<<20)
	if got, err := g.read(t, ocispec.Descriptor{Digest: d, Size: 1}, 0, 1); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 {
		t.Errorf("%v is left, want one blob", files)
	}
	g.open(t, dir, 0) // no room any more
	if files, _ := os.ReadDir(dir); len(files) != 0 {
		t.Errorf("%v is left without room", files)
	}
	desc, data := g.push(31, 1000)
	g.want(t, desc, data, 0, 1000)
	if s := g.Stats(); s.Passed != 1 || s.Used != 0 {
		t.Errorf("%+v", s)
	}
}

func TestBadRequests(t *testing.T) {
	g := newRig(t, 1<<20)
	d := digest.FromString("x")
	for _, tc := range []struct {
		d            digest.Digest
		size, off, n int64
	}{
		{"sha256:../../etc/passwd", 1, 0, 1}, {"", 1, 0, 1}, {d, 1, 0, 2}, {d, 1, -1, 1}, {d, 1, 2, 0}, {d, -1, 0, 0}, {d, 5, 1, 1<<63 - 1},
	} {
		_, err := g.Open(t.Context(), g.repo(t), ocispec.Descriptor{Digest: tc.d, Size: tc.size}, tc.off, tc.n)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", tc, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	desc, _ := g.push(30, 1<<20)
	g.reg.Fault(desc.Digest.String(), 0, registrytest.Stall(0, time.Minute))
	body, err := g.Open(ctx, g.repo(t), desc, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	cancel()
	if _, err := io.ReadAll(body); !errors.Is(err, context.Canceled) {
		t.Errorf("a reader whose context ended: %v", err)
	}
}

// A registry that only says that it has a blob gets nothing of what came from another
// one: a digest is no right to read.
func TestRegistriesApart(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(40, 1<<20)
	g.want(t, desc, data, 0, desc.Size)
	g.settle(t)
	for _, n := range []int64{desc.Size, 10} {
		body, err := g.Open(t.Context(), host("evil.example"), desc, 0, n)
		if err == nil {
			_, err = io.ReadAll(body)
			_ = body.Close() // it was read
		}
		if !errdefs.IsPermissionDenied(err) {
			t.Errorf("%d bytes for another registry: %v", n, err)
		}
	}
	g.want(t, desc, data, 0, desc.Size)
	if s := g.Stats(); s.Blobs != 1 || g.reg.BlobStats(desc.Digest).Bytes != desc.Size {
		t.Errorf("%+v", s)
	}
}

// A mirror that gave wrong bytes is left alone by the next download.
func TestWrongMirror(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(41, 1<<20)
	bad := registrytest.Start(t, registrytest.Options{})
	bad.PushBlob(name, "application/octet-stream", data)
	bad.Fault(desc.Digest.String(), 0, registrytest.Corrupt(100))
	list := []*registry.Host{
		{Name: bad.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanAll},
		{Name: g.reg.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanAll},
	}
	_ = g.client.Close() // never fails
	g.client = registry.New(registry.Config{RetryMax: -1, Stall: 10 * time.Second, Hosts: func(string) []*registry.Host { return list }})
	if _, err := g.read(t, desc, 0, desc.Size); !errdefs.IsDataLoss(err) || !errors.Is(err, ErrAgain) {
		t.Fatalf("%v, want ErrDataLoss and ErrAgain", err)
	}
	g.want(t, desc, data, 0, desc.Size)
}

// Each download takes memory: what is too many is passed on.
func TestManyDownloads(t *testing.T) {
	g := newRig(t, 1<<30)
	g.most = 1
	first, one := g.push(42, 1<<20)
	second, two := g.push(43, 1<<20)
	free := make(chan struct{})
	body, err := g.Open(t.Context(), origin{g.repo(t), func(int64) { <-free }}, first, 0, first.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	g.want(t, second, two, 0, second.Size)
	if s := g.Stats(); s.Downloads != 1 || s.Passed != 1 {
		t.Errorf("%+v", s)
	}
	close(free)
	if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, one) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	g.settle(t)
	g.want(t, second, two, 0, second.Size)
	if s := g.Stats(); s.Downloads != 2 {
		t.Errorf("%+v", s)
	}
}

// What is complete keeps no login of who began its download.
func TestForgetsWhoBegan(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(44, 1000)
	g.want(t, desc, data, 0, 1000)
	g.settle(t)
	g.mu.Lock()
	defer g.mu.Unlock()
	if e := g.entries[g.key(desc.Digest)]; e == nil || !e.complete || e.by != nil {
		t.Errorf("%+v", e)
	}
}

// Two manifests that disagree about a size: the second one's readers go to the registry.
func TestOtherSize(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, data := g.push(45, 1<<20)
	g.want(t, desc, data, 0, desc.Size)
	g.settle(t)
	longer := desc
	longer.Size++
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	body, err := g.Open(ctx, g.repo(t), longer, desc.Size-1, 2)
	if err == nil {
		_, err = io.ReadAll(body)
		_ = body.Close() // it was read
	}
	if err == nil || ctx.Err() != nil || g.Stats().Passed != 1 {
		t.Errorf("%v, %+v", err, g.Stats())
	}
}

// Readers whose origins all fail do not begin downloads in turns for ever.
func TestAllRefused(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, _ := g.push(46, 1<<20)
	joined := make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var bodies []io.ReadCloser
	for range 3 {
		body, err := g.Open(ctx, refusing{g.repo(t), func() error { <-joined; return errdefs.ErrUnauthenticated }}, desc, 0, desc.Size)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
		bodies = append(bodies, body)
	}
	close(joined)
	var wg sync.WaitGroup
	for _, body := range bodies {
		wg.Go(func() {
			if _, err := io.ReadAll(body); !errdefs.IsUnauthorized(err) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if s := g.Stats(); s.Downloads > 3 {
		t.Errorf("%+v", s)
	}
}

// What was given up leaves alone what came after it.
func TestGone(t *testing.T) {
	g := newRig(t, 1<<30)
	desc, _ := g.push(47, 1000)
	g.mu.Lock()
	old := g.add(g.key(desc.Digest), desc)
	g.drop(old)
	next := g.add(g.key(desc.Digest), desc)
	part := g.path(next)
	if err := os.WriteFile(part, []byte("of the next one"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := g.finish(old)
	g.mu.Unlock()
	if _, serr := os.Stat(part); err != nil || serr != nil || old.complete {
		t.Errorf("%v, %v", err, serr)
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	g.expire(next, &timer) // it was read meanwhile
	if g.entries[next.key] != next {
		t.Error("a timer that counts no more gives an entry up")
	}
}
