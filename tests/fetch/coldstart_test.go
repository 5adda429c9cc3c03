package fetch

import (
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/kinds"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// files is a tar with n files of some size, which compress to half.
func files(n, size int, seed byte) []byte {
	src := rand.NewChaCha8([32]byte{seed})
	entries := []registrytest.Entry{registrytest.Dir("d", 0o755)}
	for i := range n {
		raw := make([]byte, size/2)
		_, _ = src.Read(raw) // never fails
		entries = append(entries, registrytest.File(fmt.Sprintf("d/%d-%d", seed, i), 0o644, hex.EncodeToString(raw)))
	}
	return registrytest.Must(registrytest.Tar(entries...))
}

// cost is what one node asks a registry for.
type cost struct {
	heads, manifests, referrers, blobs int
	bytes                              int64
}

func costOf(reg *registrytest.Server) cost {
	c := cost{bytes: reg.Total().Bytes}
	for _, r := range reg.Requests("/v2/") {
		switch {
		case strings.Contains(r.Path, "/manifests/") && r.Method == http.MethodHead:
			c.heads++
		case strings.Contains(r.Path, "/manifests/"):
			c.manifests++
		case strings.Contains(r.Path, "/referrers/"):
			c.referrers++
		default:
			c.blobs++
		}
	}
	return c
}

func (c cost) String() string {
	return fmt.Sprintf("HEAD manifest %d, GET manifest %d, referrers %d, blobs and ranges %d, %.1f MB", c.heads, c.manifests, c.referrers, c.blobs, float64(c.bytes)/1e6)
}

func newNode(t *testing.T) (*node.Node, *registry.Client) {
	t.Helper()
	c := registry.New(registry.Config{Chunk: 4 << 20, Hedge: -1}) // on a busy machine nothing is asked twice
	n, err := node.Open(node.Config{Root: t.TempDir(), Registry: c})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		_ = c.Close() // never fails
	})
	return n, c
}

// readAll reads the image from its first to its last byte, as one that is run and
// looked at as a whole.
func readAll(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	l, err := n.Lease(t.Context(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < l.Size(); off += int64(len(p)) {
		if _, err := l.ReadAt(t.Context(), p[:min(int64(len(p)), l.Size()-off)], off); err != nil {
			t.Fatalf("at %d: %v", off, err)
		}
	}
}

// TestColdStart counts what a registry is asked for by the first start of an image
// on a node, until all of it is there, and by the second one. Docker Hub counts
// GET requests for manifests, other registries all requests.
func TestColdStart(t *testing.T) {
	const layers, size = 3, 512 << 10
	for _, tc := range []struct {
		name string
		make func(plain []byte) registrytest.Layer
		// The most there may be: manifests by GET, and for each layer requests
		// and bytes beside those of its blob.
		manifests, perLayer int
		beside              int64
	}{
		{"gzip", func(p []byte) registrytest.Layer { return registrytest.Must(registrytest.Gzip(p)) }, 2, 1, 0},
		{"eStargz", func(p []byte) registrytest.Layer { return registrytest.Must(registrytest.EStargz(p)) }, 2, 4, 512 << 10},
		{"zstd:chunked", func(p []byte) registrytest.Layer { return kinds.ZstdChunked(t, p) }, 2, 4, 64 << 10},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			var img registrytest.Image
			blobs := int64(0)
			for i := range layers {
				l := tc.make(files(6, size/6, byte(i)))
				blobs += int64(len(l.Blob))
				img.Layers = append(img.Layers, l)
			}
			pushed := reg.PushImage("library/x", "", img)
			reg.PushIndex("library/x", "v1", false, pushed.Desc)
			n, c := newNode(t)
			ref := reg.Host() + "/library/x:v1"
			prepare := func() {
				t.Helper()
				if _, err := n.Prepare(t.Context(), ref, ""); err != nil {
					t.Fatal(err)
				}
			}
			prepare()
			prepared := costOf(reg)
			readAll(t, n, ref)
			first := costOf(reg)
			t.Logf("prepared:      %s", prepared)
			t.Logf("all read:      %s of %.1f MB in blobs", first, float64(blobs)/1e6)
			if first.manifests > tc.manifests || first.blobs > layers*tc.perLayer+1 || first.bytes > blobs+layers*tc.beside+64<<10 {
				t.Errorf("a cold start costs %s for %d layers with %d bytes", first, layers, blobs)
			}
			var counted int64
			for _, h := range c.Stats().Hosts {
				counted += h.Manifests
			}
			if int(counted) != first.manifests {
				t.Errorf("the client counts %d GET requests for manifests, the registry got %d", counted, first.manifests)
			}
			reg.Reset()
			prepare()
			readAll(t, n, ref)
			again := costOf(reg)
			t.Logf("started again: %s", again)
			if again.manifests > 0 || again.blobs > 0 || again.heads > 2 {
				t.Errorf("a second start costs %s", again)
			}
		})
	}
}
