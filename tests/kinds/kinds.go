// Package kinds pushes images of every kind that can be read lazily, and of
// those that cannot, to an in-process registry.
package kinds

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/layer/nydus"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/convert"
)

// testdata is what other tools have made, as seen from a package's directory
// two levels below the top.
const testdata = "../../rootfs/layer/"

// Zstd makes a layer of zstd frames that hold size plain bytes each; 0 is one
// frame of all.
func Zstd(plain []byte, size int) registrytest.Layer {
	l := registrytest.Layer{MediaType: ocispec.MediaTypeImageLayerZstd, DiffID: digest.FromBytes(plain)}
	w := registrytest.Must(zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest)))
	if size == 0 {
		size = len(plain)
	}
	for rest := plain; len(rest) > 0; {
		n := min(size, len(rest))
		l.Blob = w.EncodeAll(rest[:n], l.Blob)
		rest = rest[n:]
	}
	return l
}

// ZstdChunked makes a layer of podman's zstd:chunked.
func ZstdChunked(tb testing.TB, plain []byte) registrytest.Layer {
	tb.Helper()
	return converted(tb, plain, convert.ZstdChunked)
}

// ZstdStargz makes a layer of stargz-snapshotter's zstd:chunked.
func ZstdStargz(tb testing.TB, plain []byte) registrytest.Layer {
	tb.Helper()
	return converted(tb, plain, convert.ZstdStargz)
}

func converted(tb testing.TB, plain []byte, f convert.Format) registrytest.Layer {
	tb.Helper()
	var b bytes.Buffer
	r, err := convert.Layer(tb.Context(), bytes.NewReader(plain), &b, convert.Options{Format: f})
	if err != nil {
		tb.Fatal(err)
	}
	return registrytest.Layer{
		Blob: b.Bytes(), MediaType: r.Descriptor.MediaType, DiffID: r.DiffID, Annotations: r.Descriptor.Annotations,
	}
}

// PushExternal pushes an image of one eStargz layer whose TOC is in an image of
// its own, as stargz-snapshotter's converter makes it.
func PushExternal(tb testing.TB, s *registrytest.Server, repo, tag string, plain []byte) registrytest.Pushed {
	tb.Helper()
	c := externaltoc.NewGzipCompressionWithLevel(nil, stdgzip.BestSpeed).(*externaltoc.GzipCompression)
	l, err := registrytest.EStargz(plain, estargz.WithCompression(c))
	if err != nil {
		tb.Fatal(err)
	}
	var toc bytes.Buffer
	if _, err := c.WriteTOCTo(&toc); err != nil {
		tb.Fatal(err)
	}
	s.PushImage(repo, tag+"-esgztoc", registrytest.Image{Layers: []registrytest.Layer{{
		Blob: toc.Bytes(), MediaType: ocispec.MediaTypeImageLayerGzip, DiffID: digest.FromBytes(toc.Bytes()),
		Annotations: map[string]string{"containerd.io/snapshot/stargz/layer.digest": digest.FromBytes(l.Blob).String()},
	}}})
	return s.PushImage(repo, tag, registrytest.Image{Layers: []registrytest.Layer{l}})
}

// PushNydus pushes an image of nydus-image's, by the name of its directory in
// testdata.
func PushNydus(tb testing.TB, s *registrytest.Server, repo, tag, name string) registrytest.Pushed {
	tb.Helper()
	files, err := filepath.Glob(testdata + "nydus/testdata/" + name + "/*")
	if err != nil || len(files) == 0 {
		tb.Fatalf("no Nydus image %s: %v", name, err)
	}
	var data, boot []registrytest.Layer
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			tb.Fatal(err)
		}
		l := registrytest.Layer{Blob: b, DiffID: digest.FromBytes(b)}
		if strings.HasSuffix(file, ".blob") {
			l.MediaType, l.Annotations = nydus.BlobMediaType, map[string]string{nydus.BlobAnnotation: "true"}
			data = append(data, l)
		} else {
			l.MediaType, l.Annotations = ocispec.MediaTypeImageLayerGzip, map[string]string{nydus.BootstrapAnnotation: "true"}
			boot = append(boot, l)
		}
	}
	return s.PushImage(repo, tag, registrytest.Image{Layers: append(data, boot...)})
}

// PushSOCI pushes the image of three layers with SOCI indexes that soci has
// made. Version 2 is the image index that binds one; version 1 the image alone,
// without the annotation that binds, and a referrer with the same ztocs.
func PushSOCI(tb testing.TB, s *registrytest.Server, repo, tag string, version int) ocispec.Descriptor {
	tb.Helper()
	files := sociFiles(tb)
	var layout, index ocispec.Index
	decode(tb, files["index.json"], &layout)
	blob := func(d digest.Digest) []byte { return files[d.Encoded()] }
	top := layout.Manifests[0]
	decode(tb, blob(top.Digest), &index)
	for name, b := range files {
		s.PushBlobAs(repo, digest.NewDigestFromEncoded(digest.SHA256, name), b)
	}
	if version == 2 {
		for _, d := range index.Manifests {
			s.PushManifest(repo, "", d.MediaType, blob(d.Digest))
		}
		return s.PushManifest(repo, tag, ocispec.MediaTypeImageIndex, blob(top.Digest))
	}
	var img ocispec.Manifest
	decode(tb, blob(index.Manifests[0].Digest), &img)
	named := digest.Digest(img.Annotations["com.amazon.soci.index-digest"])
	img.Annotations = nil
	desc := s.PushManifest(repo, tag, ocispec.MediaTypeImageManifest, encode(tb, img))
	var soci ocispec.Manifest
	decode(tb, blob(named), &soci)
	soci.ArtifactType, soci.Config.MediaType = "", "application/vnd.amazon.soci.index.v1+json"
	soci.Subject = &desc
	s.PushManifest(repo, "", ocispec.MediaTypeImageManifest, encode(tb, soci))
	return desc
}

// sociFiles are the files of the layout in testdata by their last names.
func sociFiles(tb testing.TB) map[string][]byte {
	tb.Helper()
	f, err := os.Open(testdata + "soci/testdata/image.tar.gz")
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	z, err := stdgzip.NewReader(f)
	if err != nil {
		tb.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			tb.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if files[path.Base(h.Name)], err = io.ReadAll(r); err != nil {
			tb.Fatal(err)
		}
	}
}

func decode(tb testing.TB, b []byte, to any) {
	tb.Helper()
	if err := json.Unmarshal(b, to); err != nil {
		tb.Fatal(fmt.Errorf("testdata: %w", err))
	}
}

func encode(tb testing.TB, v any) []byte {
	tb.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// Text is a tar without the entries whose names are not UTF-8, which tables of
// contents, being JSON, cannot hold.
func Text(plain []byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for r := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			panic(err)
		}
		body := registrytest.Must(io.ReadAll(r))
		if !utf8.ValidString(h.Name) || !utf8.ValidString(h.Linkname) {
			continue
		}
		h.Xattrs = nil //nolint:staticcheck // the reader fills it with what is in PAXRecords
		if err := w.WriteHeader(h); err != nil {
			panic(err)
		}
		registrytest.Must(w.Write(body))
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}
