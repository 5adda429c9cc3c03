package image

import (
	"encoding/json"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzManifest feeds manifests, indexes and configs: what is accepted must be
// within the bounds that the rest of the program relies on.
func FuzzManifest(f *testing.F) {
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromString("x"), Size: 1}
	seed := func(v any) []byte {
		data, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		return data
	}
	two := specs.Versioned{SchemaVersion: 2}
	f.Add(seed(ocispec.Manifest{Versioned: two, Config: d, Layers: []ocispec.Descriptor{d, d}}),
		seed(ocispec.Image{RootFS: ocispec.RootFS{DiffIDs: []digest.Digest{d.Digest, d.Digest}}}))
	f.Add(seed(ocispec.Index{Versioned: two, Manifests: []ocispec.Descriptor{d}}), []byte("{}"))
	withPlatform := d
	withPlatform.Platform = &ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8.1"}
	f.Add(seed(ocispec.Index{Versioned: two, Manifests: []ocispec.Descriptor{withPlatform}}), []byte("[]"))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[],"layers":[]}`), []byte(`{"rootfs":{"diff_ids":["x"]}}`))
	f.Fuzz(func(t *testing.T, data, config []byte) {
		for _, mediaType := range []string{
			ocispec.MediaTypeImageIndex, dockerManifestList, ocispec.MediaTypeImageManifest, dockerManifest, dockerSchema1, "",
		} {
			doc, err := decode(data, mediaType)
			if err != nil {
				continue
			}
			if (doc.index == nil) == (doc.manifest == nil) {
				t.Fatalf("%s: neither or both of index and manifest", mediaType)
			}
			if doc.index != nil {
				checkIndex(t, doc.index)
			} else {
				checkManifest(t, doc.manifest, config)
			}
		}
	})
}

func checkIndex(t *testing.T, index *ocispec.Index) {
	t.Helper()
	if len(index.Manifests) > maxManifests {
		t.Errorf("%d manifests", len(index.Manifests))
	}
	for _, want := range []string{"amd64", "arm64", "arm"} {
		got, err := choose(index.Manifests, ocispec.Platform{OS: "linux", Architecture: want})
		if err == nil && (got.Digest.Validate() != nil || got.Size < 0) {
			t.Errorf("chosen %+v", got)
		}
	}
}

func checkManifest(t *testing.T, m *ocispec.Manifest, config []byte) {
	t.Helper()
	if len(m.Layers) > MaxLayers || m.Config.Size < 0 || m.Config.Size > MaxConfig {
		t.Errorf("%d layers, config of %d bytes", len(m.Layers), m.Config.Size)
	}
	for _, l := range m.Layers {
		if l.Digest.Validate() != nil || l.Size < 0 {
			t.Errorf("layer %+v", l)
		}
	}
	_, ids, err := decodeConfig(config, len(m.Layers))
	if err == nil && len(ids) != len(m.Layers) {
		t.Errorf("%d layers, %d diffIDs", len(m.Layers), len(ids))
	}
}
