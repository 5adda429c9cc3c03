package unpack

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// randomEntries makes a layer over a small set of names, so that layers meet:
// directories first, then files, links, and whiteouts of lower names.
func randomEntries(rng *rand.Rand, layer int) []registrytest.Entry {
	var entries []registrytest.Entry
	add := func(e registrytest.Entry) {
		e.ModTime = time.Unix(int64(1e9+rng.IntN(1e6)), 0)
		e.Uid, e.Gid = rng.IntN(3), rng.IntN(3)
		entries = append(entries, e)
	}
	for d := range 8 {
		dir := fmt.Sprintf("d%d", d)
		add(tarDir(dir+"/", int64(0o700+rng.IntN(8))))
		var files []string
		for f := range 12 {
			name := fmt.Sprintf("%s/f%d", dir, f)
			switch k := rng.IntN(10); {
			case k < 4:
				add(tarFile(name, int64(0o600+rng.IntN(0o200)), fmt.Sprint(layer, name, rng.Int())))
				files = append(files, name)
			case k < 5:
				add(tarSym(name, fmt.Sprint("f", rng.IntN(20))))
			case k < 6 && len(files) > 0:
				target := files[rng.IntN(len(files))]
				h := tarHard(name, target)
				for _, e := range entries {
					if e.Name == target { // umoci applies the attributes of the link
						h.Header = e.Header
						h.Typeflag, h.Name, h.Linkname, h.Size = tar.TypeLink, name, target, 0
					}
				}
				entries = append(entries, h)
			case k < 7 && layer > 0:
				add(tarFile(fmt.Sprintf("%s/.wh.f%d", dir, f), 0, ""))
			case k < 8:
				add(tarDir(name+"/", 0o755))
				add(tarFile(name+"/x", 0o644, fmt.Sprint(layer)))
			}
		}
		if layer > 0 && rng.IntN(4) == 0 {
			add(tarFile(dir+"/.wh..wh..opq", 0, ""))
		}
	}
	return entries
}

// umociUnpack returns the root file system that umoci makes of the layers.
func umociUnpack(t *testing.T, layers [][]byte) string {
	t.Helper()
	dir := t.TempDir()
	store := func(b []byte) ocispec.Descriptor {
		d := digest.FromBytes(b)
		p := filepath.Join(dir, "blobs", "sha256", d.Encoded())
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return ocispec.Descriptor{Digest: d, Size: int64(len(b))}
	}
	storeJSON := func(mediaType string, v any) ocispec.Descriptor {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d := store(b)
		d.MediaType = mediaType
		return d
	}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		d := store(l)
		d.MediaType = ocispec.MediaTypeImageLayer
		m.Layers = append(m.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, d.Digest)
	}
	m.Config = storeJSON(ocispec.MediaTypeImageConfig, config)
	md := storeJSON(ocispec.MediaTypeImageManifest, m)
	md.Annotations = map[string]string{ocispec.AnnotationRefName: "x"}
	idx, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{md}})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]string{"index.json": string(idx), "oci-layout": `{"imageLayoutVersion":"1.0.0"}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), "umoci", "raw", "unpack", "--image", dir+":x", filepath.Join(dir, "rootfs")).CombinedOutput()
	if err != nil {
		t.Fatalf("umoci: %v\n%s", err, out)
	}
	return filepath.Join(dir, "rootfs")
}
