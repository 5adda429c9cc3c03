package soci

import (
	"archive/tar"
	stdgzip "compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// realImage is the image in testdata, whose indexes the real tool made.
type realImage struct {
	blobs    map[digest.Digest][]byte
	root     digest.Digest // of the image index
	index    ocispec.Index
	desc     ocispec.Descriptor // of the image manifest that names an index
	manifest ocispec.Manifest
}

func loadReal(tb testing.TB) *realImage {
	tb.Helper()
	img := &realImage{blobs: map[digest.Digest][]byte{}}
	var layout ocispec.Index
	unpack(tb, "testdata/image.tar.gz", func(name string, data []byte) {
		if name == "index.json" {
			decode(tb, data, &layout)
			return
		}
		img.blobs[digest.NewDigestFromEncoded(digest.SHA256, path.Base(name))] = data
	})
	img.root = layout.Manifests[0].Digest
	decode(tb, img.blobs[img.root], &img.index)
	img.desc = img.index.Manifests[0]
	decode(tb, img.blobs[img.desc.Digest], &img.manifest)
	return img
}

// unpack calls f for the files in a tar.gz.
func unpack(tb testing.TB, file string, f func(name string, data []byte)) {
	tb.Helper()
	in, err := os.Open(file)
	if err != nil {
		tb.Fatal(err)
	}
	defer in.Close()
	z, err := stdgzip.NewReader(in)
	if err != nil {
		tb.Fatal(err)
	}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			tb.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			tb.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			f(h.Name, data)
		}
	}
}

func decode(tb testing.TB, data []byte, to any) {
	tb.Helper()
	if err := json.Unmarshal(data, to); err != nil {
		tb.Fatal(err)
	}
}

// ztocs are the ztocs of the layers, by reading the index of version 2 plainly.
func (img *realImage) ztocs(tb testing.TB) map[digest.Digest]digest.Digest {
	tb.Helper()
	var m ocispec.Manifest
	decode(tb, img.blobs[digest.Digest(img.manifest.Annotations["com.amazon.soci.index-digest"])], &m)
	all := map[digest.Digest]digest.Digest{}
	for _, l := range m.Layers {
		all[digest.Digest(l.Annotations["com.amazon.soci.image-layer-digest"])] = l.Digest
	}
	if len(all) != 3 {
		tb.Fatalf("%d ztocs in testdata", len(all))
	}
	return all
}
