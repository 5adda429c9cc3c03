// Command toestargz copies the image of an OCI layout directory with its gzip
// layers made eStargz ones:
//
//	toestargz FROM TO
//
// It is for measurements; both layouts have the tag "latest".
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: toestargz FROM TO")
	}
	if err := convert(layout(os.Args[1]), layout(os.Args[2])); err != nil {
		log.Fatal("toestargz: ", err)
	}
}

// layout is an OCI image layout directory.
type layout string

func (l layout) path(d digest.Digest) string {
	return filepath.Join(string(l), "blobs", d.Algorithm().String(), d.Encoded())
}

func (l layout) read(d digest.Digest, v any) error {
	b, err := os.ReadFile(l.path(d))
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func (l layout) put(mediaType string, b []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return desc, os.WriteFile(l.path(desc.Digest), b, 0o644)
}

func (l layout) putJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return l.put(mediaType, b)
}

func convert(from, to layout) error {
	var index ocispec.Index
	var manifest ocispec.Manifest
	var config ocispec.Image
	b, err := os.ReadFile(filepath.Join(string(from), ocispec.ImageIndexFile))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &index); err != nil {
		return err
	}
	if len(index.Manifests) != 1 {
		return fmt.Errorf("%s has %d images, want one", from, len(index.Manifests))
	}
	if err := from.read(index.Manifests[0].Digest, &manifest); err != nil {
		return err
	}
	if err := from.read(manifest.Config.Digest, &config); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(string(to), "blobs", "sha256"), 0o755); err != nil {
		return err
	}
	for i, l := range manifest.Layers {
		if manifest.Layers[i], config.RootFS.DiffIDs[i], err = layer(from, to, l); err != nil {
			return fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}
	return finish(to, manifest, config)
}

// layer makes one layer anew.
func layer(from, to layout, l ocispec.Descriptor) (ocispec.Descriptor, digest.Digest, error) {
	f, err := os.Open(from.path(l.Digest))
	if err != nil {
		return l, "", err
	}
	defer f.Close()
	blob, err := estargz.Build(io.NewSectionReader(f, 0, l.Size))
	if err != nil {
		return l, "", err
	}
	defer blob.Close()
	b, err := io.ReadAll(blob)
	if err != nil {
		return l, "", err
	}
	desc, err := to.put(ocispec.MediaTypeImageLayerGzip, b)
	desc.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: blob.TOCDigest().String()}
	return desc, blob.DiffID(), err
}

// finish writes what leads to the layers.
func finish(to layout, manifest ocispec.Manifest, config ocispec.Image) error {
	var err error
	if manifest.Config, err = to.putJSON(ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	desc, err := to.putJSON(ocispec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: "latest"}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{desc}})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(string(to), ocispec.ImageIndexFile), index, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(string(to), ocispec.ImageLayoutFile), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}
