package registrytest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Must unwraps what a builder returns; it panics on an error, as tests may.
func Must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Entry is one entry of a tar archive; Size is set from Body.
type Entry struct {
	tar.Header
	Body []byte
}

// File is a regular file.
func File(name string, mode int64, body string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, Body: []byte(body)}
}

// Dir is a directory.
func Dir(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: mode}}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Hardlink is another name of the file target.
func Hardlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

// Tar writes an archive.
func Tar(entries ...Entry) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.Body))
		if err := w.WriteHeader(&h); err != nil {
			return nil, fmt.Errorf("write tar entry %q: %w", h.Name, err)
		}
		if _, err := w.Write(e.Body); err != nil {
			return nil, fmt.Errorf("write tar entry %q: %w", h.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("close tar: %w", err)
	}
	return buf.Bytes(), nil
}

// Layer is a blob with what a manifest and a config say about it. MediaType is
// that of OCI; Image translates it for Docker.
type Layer struct {
	Blob        []byte
	MediaType   string
	DiffID      digest.Digest
	Annotations map[string]string
}

// Uncompressed makes a layer of a tar archive as it is.
func Uncompressed(tarball []byte) Layer {
	return Layer{Blob: tarball, MediaType: ocispec.MediaTypeImageLayer, DiffID: digest.FromBytes(tarball)}
}

// Gzip makes a layer in one gzip member of default level.
func Gzip(tarball []byte) (Layer, error) {
	return GzipLevel(tarball, gzip.DefaultCompression)
}

// GzipLevel is Gzip with a level of compress/gzip.
func GzipLevel(tarball []byte, level int) (Layer, error) {
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, level)
	if err != nil {
		return Layer{}, fmt.Errorf("compress a layer: %w", err)
	}
	if _, err := w.Write(tarball); err != nil {
		return Layer{}, fmt.Errorf("compress a layer: %w", err)
	}
	if err := w.Close(); err != nil {
		return Layer{}, fmt.Errorf("compress a layer: %w", err)
	}
	return Layer{Blob: buf.Bytes(), MediaType: ocispec.MediaTypeImageLayerGzip, DiffID: digest.FromBytes(tarball)}, nil
}

// EStargz makes a layer with a table of contents, as
// containerd/stargz-snapshotter does. Its tar stream is not the given one: the
// library orders it anew and adds entries of its own.
func EStargz(tarball []byte, opts ...estargz.Option) (Layer, error) {
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(tarball), 0, int64(len(tarball))), opts...)
	if err != nil {
		return Layer{}, fmt.Errorf("build an eStargz layer: %w", err)
	}
	blob, err := io.ReadAll(b)
	if err != nil {
		return Layer{}, fmt.Errorf("build an eStargz layer: %w", err)
	}
	if err := b.Close(); err != nil { // DiffID is known only then
		return Layer{}, fmt.Errorf("build an eStargz layer: %w", err)
	}
	return Layer{
		Blob: blob, MediaType: ocispec.MediaTypeImageLayerGzip, DiffID: b.DiffID(),
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: b.TOCDigest().String()},
	}, nil
}
