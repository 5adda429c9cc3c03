// Package ocilayout reads and writes OCI image layout directories that hold one
// image with the tag "latest", as the programs that make images for tests and
// measurements do. Blobs are streamed: layers of several GB are no matter.
package ocilayout

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Tag of the image in every layout.
const Tag = "latest"

// Dir is the path of a layout.
type Dir string

// Image is what leads to the layers.
type Image struct {
	Manifest ocispec.Manifest
	Config   ocispec.Image
}

// Create makes an empty layout at path.
func Create(path string) (Dir, error) {
	if err := os.MkdirAll(filepath.Join(path, ocispec.ImageBlobsDir, digest.SHA256.String()), 0o755); err != nil {
		return "", fmt.Errorf("make a layout: %w", err)
	}
	return Dir(path), nil
}

// Path is where a blob is.
func (d Dir) Path(dg digest.Digest) string {
	return filepath.Join(string(d), ocispec.ImageBlobsDir, dg.Algorithm().String(), dg.Encoded())
}

// Put adds a blob.
func (d Dir) Put(mediaType string, b []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return desc, os.WriteFile(d.Path(desc.Digest), b, 0o644)
}

// PutJSON adds a blob that is v in JSON.
func (d Dir) PutJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("encode %s: %w", mediaType, err)
	}
	return d.Put(mediaType, b)
}

// PutFrom adds a blob that is written piece by piece.
func (d Dir) PutFrom(mediaType string, write func(io.Writer) error) (desc ocispec.Descriptor, err error) {
	f, err := os.CreateTemp(string(d), "blob-")
	if err != nil {
		return desc, fmt.Errorf("make a blob: %w", err)
	}
	defer os.Remove(f.Name()) //nolint:errcheck // it is gone where all went well
	sum := digest.SHA256.Digester()
	err = write(io.MultiWriter(f, sum.Hash()))
	size, err2 := f.Seek(0, io.SeekCurrent)
	if err := errors.Join(err, err2, f.Close()); err != nil {
		return desc, fmt.Errorf("write a blob of type %s: %w", mediaType, err)
	}
	desc = ocispec.Descriptor{MediaType: mediaType, Digest: sum.Digest(), Size: size}
	return desc, os.Rename(f.Name(), d.Path(desc.Digest))
}

// Link adds a blob of another layout on the same file system.
func (d Dir) Link(from Dir, dg digest.Digest) error {
	err := os.Link(from.Path(dg), d.Path(dg))
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// Image reads what leads to the layers of the only image.
func (d Dir) Image() (img Image, err error) {
	var index ocispec.Index
	if err := readJSON(filepath.Join(string(d), ocispec.ImageIndexFile), &index); err != nil {
		return img, err
	}
	if len(index.Manifests) != 1 {
		return img, fmt.Errorf("%s has %d images, want one", d, len(index.Manifests))
	}
	if err := readJSON(d.Path(index.Manifests[0].Digest), &img.Manifest); err != nil {
		return img, err
	}
	return img, readJSON(d.Path(img.Manifest.Config.Digest), &img.Config)
}

// Finish writes the config, the manifest with it, and the index with that. The
// image's layers are there already.
func (d Dir) Finish(img Image) error {
	desc, err := d.PutImage(img)
	if err != nil {
		return err
	}
	return d.Seal(desc)
}

// PutImage writes the config and the manifest with it.
func (d Dir) PutImage(img Image) (desc ocispec.Descriptor, err error) {
	if img.Manifest.Config, err = d.PutJSON(ocispec.MediaTypeImageConfig, img.Config); err != nil {
		return desc, err
	}
	img.Manifest.Versioned, img.Manifest.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest
	return d.PutJSON(ocispec.MediaTypeImageManifest, img.Manifest)
}

// Seal gives a manifest or an index of manifests the tag and completes the
// layout.
func (d Dir) Seal(desc ocispec.Descriptor) error {
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: Tag}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{desc},
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(string(d), ocispec.ImageIndexFile), index, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(string(d), ocispec.ImageLayoutFile), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
