package containerd

import (
	"compress/gzip"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// blob is a layer as the registry has it.
type blob struct {
	digest string
	size   int64
}

// image is one that was pushed.
type image struct {
	ref, repo string
	layers    []blob // lowest first
}

// These are who the images' named user is.
const (
	userName = "tatami"
	userID   = 4711
)

// tools is a layer with a static busybox, its common names, and users.
func tools(t *testing.T) []registrytest.Entry {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	list := []registrytest.Entry{
		registrytest.Dir("bin", 0o755), registrytest.File("bin/busybox", 0o755, string(busybox)),
		registrytest.Dir("etc", 0o755),
		registrytest.File("etc/passwd", 0o644, "root:x:0:0::/:/bin/sh\ntatami:x:4711:4712::/:/bin/sh\n"),
		registrytest.File("etc/group", 0o644, "root:x:0:\ntatami:x:4712:\n"),
	}
	for _, name := range []string{"sh", "cat", "sleep", "id", "sha256sum", "true", "wc", "echo"} {
		list = append(list, registrytest.Symlink("bin/"+name, "busybox"))
	}
	return list
}

// noise is n bytes that do not compress, the same for the same seed.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(b) // never fails
	return string(b)
}

// pushImage makes an image of layers, lowest first, and pushes it.
func (r *registry) pushImage(t *testing.T, repo string, config ocispec.ImageConfig, layers ...registrytest.Layer) image {
	t.Helper()
	layout, err := ocilayout.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	img := ocilayout.Image{Config: ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   config, RootFS: ocispec.RootFS{Type: "layers"},
	}}
	out := image{repo: repo}
	for _, l := range layers {
		desc, err := layout.Put(l.MediaType, l.Blob)
		if err != nil {
			t.Fatal(err)
		}
		desc.Annotations = l.Annotations
		img.Manifest.Layers = append(img.Manifest.Layers, desc)
		img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, l.DiffID)
		out.layers = append(out.layers, blob{desc.Digest.String(), desc.Size})
	}
	if err := layout.Finish(img); err != nil {
		t.Fatal(err)
	}
	out.ref = r.push(t, repo, "1", layout)
	return out
}

// gzipped makes a layer of entries.
func gzipped(t *testing.T, entries ...registrytest.Entry) registrytest.Layer {
	t.Helper()
	tar, err := registrytest.Tar(entries...)
	if err != nil {
		t.Fatal(err)
	}
	l, err := registrytest.Gzip(tar)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// eStargz makes a layer of entries that can be read at any place.
func eStargz(t *testing.T, entries ...registrytest.Entry) registrytest.Layer {
	t.Helper()
	tar, err := registrytest.Tar(entries...)
	if err != nil {
		t.Fatal(err)
	}
	l, err := registrytest.EStargz(tar, estargz.WithCompressionLevel(gzip.BestSpeed), estargz.WithChunkSize(part/2))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// pushPause pushes the image of sandboxes and returns its reference.
func (r *registry) pushPause(t *testing.T) string {
	t.Helper()
	sleep := ocispec.ImageConfig{Entrypoint: []string{"/bin/sleep", "1000000"}}
	return r.pushImage(t, "pause", sleep, gzipped(t, tools(t)...)).ref
}

// What the application's image has besides tools: a small file and a large one.
const (
	greeting  = "read from the image"
	largeSize = 8 * part
	part      = 1 << 20 // two chunks
)

// appLayers makes what pushApp pushes, once for a seed: compressing takes longer
// than most tests.
var appLayers = struct {
	sync.Mutex
	made map[uint64][]registrytest.Layer // by seed; protected by the mutex
}{made: map[uint64][]registrytest.Layer{}}

// pushApp pushes an image of two layers, the upper one large and with a table of
// contents: preparing it fetches next to nothing. Its user is a named one.
func (r *registry) pushApp(t *testing.T, repo string, seed uint64) image {
	t.Helper()
	config := ocispec.ImageConfig{Cmd: []string{"/bin/sleep", "1000000"}, Env: []string{"PATH=/bin"}, User: userName}
	return r.pushImage(t, repo, config, layersOf(t, seed)...)
}

func layersOf(t *testing.T, seed uint64) []registrytest.Layer {
	t.Helper()
	appLayers.Lock()
	defer appLayers.Unlock()
	layers := appLayers.made[seed]
	if layers == nil {
		layers = []registrytest.Layer{gzipped(t, tools(t)...), eStargz(t,
			registrytest.Dir("data", 0o755),
			registrytest.File("data/large", 0o644, noise(seed, largeSize)),
			registrytest.File("data/greeting", 0o644, greeting+"\n"),
		)}
		appLayers.made[seed] = layers
	}
	return layers
}
