package node

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// rig is a node and a registry.
type rig struct {
	*Node
	reg  *registrytest.Server
	root string
	log  *bytes.Buffer

	client *registry.Client
	turns  *sched.Scheduler // nil: everybody's

	quota    int64    // of the store from the next restart on, in bytes; 0: none
	pinned   []string // likewise
	profiles Profiles // likewise
}

func newRig(t *testing.T) *rig {
	t.Helper()
	g := &rig{reg: registrytest.Start(t, registrytest.Options{}), root: t.TempDir()}
	g.open(t)
	return g
}

// open starts the node on what is on disk; it is closed with the test, or by
// restart.
func (g *rig) open(t *testing.T) {
	t.Helper()
	client := registry.New(registry.Config{RetryMax: -1, RetryWait: time.Millisecond, Stall: 500 * time.Millisecond, Sched: g.turns})
	g.log = new(bytes.Buffer)
	n, err := Open(Config{
		Root: g.root, Registry: client, Blobs: 1 << 30, Quota: func(int64) (int64, error) { return g.quota, nil }, High: 50, Low: 40,
		Pinned: g.pinned, Profiles: g.profiles, Sched: g.turns, Log: slog.New(slog.NewTextHandler(g.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	n.Release()
	g.Node, g.client = n, client
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		_ = client.Close() // never fails
	})
}

func (g *rig) restart(t *testing.T) {
	t.Helper()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g.open(t)
}

func (g *rig) ref(object string) string { return g.reg.Host() + "/library/" + object }

func (g *rig) prepare(t *testing.T, object string) *Prepared {
	t.Helper()
	p, err := g.Prepare(t.Context(), g.ref(object), "")
	if err != nil {
		t.Fatalf("prepare %s: %v", object, err)
	}
	return p
}

func (g *rig) lease(t *testing.T, object string) *Lease {
	t.Helper()
	l, err := g.Lease(t.Context(), g.ref(object), "")
	if err != nil {
		t.Fatalf("lease %s: %v", object, err)
	}
	t.Cleanup(l.Close)
	return l
}

// tree is the files of a layer: path to content.
type tree map[string]string

// text returns n bytes that differ from seed to seed and compress to half.
func text(seed byte, n int) string {
	raw := make([]byte, (n+1)/2)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(raw) // never fails
	return hex.EncodeToString(raw)[:n]
}

func (f tree) tar(t *testing.T) []byte {
	t.Helper()
	var entries []registrytest.Entry
	for path, content := range f {
		entries = append(entries, registrytest.File(path, 0o644, content))
	}
	return registrytest.Must(registrytest.Tar(entries...))
}

func (f tree) gzip(t *testing.T) registrytest.Layer {
	t.Helper()
	return registrytest.Must(registrytest.Gzip(f.tar(t)))
}

func (f tree) estargz(t *testing.T) registrytest.Layer {
	t.Helper()
	return registrytest.Must(registrytest.EStargz(f.tar(t)))
}

func (g *rig) push(object string, layers ...registrytest.Layer) registrytest.Pushed {
	name, tag, _ := strings.Cut(object, ":")
	return g.reg.PushImage("library/"+name, tag, registrytest.Image{Layers: layers})
}

// layerBytes is what the registry sent of layers' blobs.
func (g *rig) layerBytes(p registrytest.Pushed) int64 {
	sum := int64(0)
	for _, l := range p.Layers {
		sum += g.reg.BlobStats(l.Digest).Bytes
	}
	return sum
}

// check reads all files of a layer out of its segment and compares them.
func (g *rig) check(t *testing.T, l *Lease, layer int, want tree) {
	t.Helper()
	if err := g.read(t.Context(), l, layer, want); err != nil {
		t.Fatal(err)
	}
}

func (g *rig) read(ctx context.Context, l *Lease, layer int, want tree) error {
	idx, err := g.readLayer(l.record.Layers[layer].key())
	if err != nil {
		return err
	}
	id := idx.Table.ID()
	found := 0
	for _, e := range idx.Entries {
		content, ok := want[e.Path]
		if !ok || e.Kind != index.File {
			continue
		}
		found++
		body, err := l.Open(ctx, kindSegment, id, e.Off, e.Size)
		if err != nil {
			return err
		}
		got, err := io.ReadAll(body)
		if err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		if string(got) != content {
			return fmt.Errorf("%s: %d bytes differ from the %d that were pushed", e.Path, len(got), len(content))
		}
	}
	if found != len(want) {
		return fmt.Errorf("%d of %d files found", found, len(want))
	}
	return nil
}

// nothingKept checks that a failed prepare left nothing that a later one or a reader
// could take for good.
func (g *rig) nothingKept(t *testing.T) {
	t.Helper()
	g.layers.wg.Wait() // a cancelled job takes a moment
	if s := g.Stats(); s.Images != 0 {
		t.Errorf("%d images are known", s.Images)
	}
	for _, dir := range []string{"images", "refs", "tmp", "store/images"} {
		if left := g.list(t, dir); len(left) > 0 {
			t.Errorf("%s has %v", dir, left)
		}
	}
	// The store makes the segments of other layers durable in the background.
	for _, path := range g.list(t, "store/tmp") {
		if strings.HasPrefix(filepath.Base(path), "ingest-") {
			t.Errorf("store/tmp has %s", path)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.pins)+len(g.jobs)+len(g.fetching)+len(g.leases) > 0 {
		t.Errorf("left over: pins %v, jobs %v, fetching %v, leases %v", g.pins, g.jobs, g.fetching, g.leases)
	}
}

// list returns the files below a directory of the node.
func (g *rig) list(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(filepath.Join(g.root, dir), func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			out = append(out, path)
		}
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return out
}

// loseSegments deletes the plain bytes that the store keeps, as an eviction or
// a crash would. The node must be closed.
func (g *rig) loseSegments(t *testing.T) {
	t.Helper()
	n := 0
	for _, path := range g.list(t, "store/segments") {
		if ext := filepath.Ext(path); ext == ".data" || ext == ".bits" {
			n++
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n == 0 {
		t.Fatal("the store kept no segment")
	}
}

// object reads a whole object of a lease.
func object(t *testing.T, l *Lease, kind string, d digest.Digest) []byte {
	t.Helper()
	desc, ok := l.Find(kind, d)
	if !ok {
		t.Fatalf("%s %s is not found", kind, d)
	}
	body, err := l.Open(t.Context(), kind, d, 0, desc.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	data, err := io.ReadAll(body)
	if err != nil || int64(len(data)) != desc.Size {
		t.Fatalf("%s %s: %d of %d bytes, %v", kind, d, len(data), desc.Size, err)
	}
	return data
}
