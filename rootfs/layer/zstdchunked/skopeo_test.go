package zstdchunked

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/layertest"
	"github.com/tatami-containers/tatami/tests/torture"
)

// TestSkopeo has layers with everything in them converted by the skopeo that is
// installed, of whatever age. Old ones lose attributes without a value.
func TestSkopeo(t *testing.T) {
	if _, err := exec.LookPath("skopeo"); err != nil {
		t.Skip("skopeo is not installed")
	}
	layers := torture.Layers()
	from, to := t.TempDir(), t.TempDir()
	writeLayout(t, from, layers)
	out, err := exec.CommandContext(t.Context(), "skopeo", "--insecure-policy", "copy", "--dest-compress",
		"--dest-compress-format", "zstd:chunked", "oci:"+from, "dir:"+to).CombinedOutput()
	if err != nil {
		t.Fatalf("skopeo: %v: %s", err, out)
	}
	var m ocispec.Manifest
	readJSON(t, filepath.Join(to, "manifest.json"), &m)
	if len(m.Layers) != len(layers) {
		t.Fatalf("%d layers", len(m.Layers))
	}
	for i, plain := range layers {
		data, err := os.ReadFile(filepath.Join(to, m.Layers[i].Digest.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		check(t, &layertest.Blob{Data: data}, m.Layers[i].Annotations, plain, layertest.Limits{Empty: true})
	}
}

func readJSON(t *testing.T, file string, v any) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// writeLayout makes an OCI layout with one image of uncompressed layers.
func writeLayout(t *testing.T, dir string, layers [][]byte) {
	t.Helper()
	write := func(name string, b []byte) {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	marshal := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	blob := func(mediaType string, b []byte) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		write(filepath.Join("blobs", "sha256", d.Digest.Encoded()), b)
		return d
	}
	config := ocispec.Image{Platform: ocispec.Platform{Architecture: "amd64", OS: "linux"}, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		m.Layers = append(m.Layers, blob(ocispec.MediaTypeImageLayer, l))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
	}
	m.Config = blob(ocispec.MediaTypeImageConfig, marshal(config))
	write("index.json", marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2},
		Manifests: []ocispec.Descriptor{blob(ocispec.MediaTypeImageManifest, marshal(m))}}))
	write(ocispec.ImageLayoutFile, marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}))
}
