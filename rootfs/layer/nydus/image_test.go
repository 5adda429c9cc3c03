package nydus_test

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/nydus"
)

// memory is a blob in memory.
type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	if off < 0 || n < 0 || off+n > m.Size() {
		return nil, fmt.Errorf("range %d+%d of %d", off, n, len(m))
	}
	return io.NopCloser(bytes.NewReader(m[off : off+n])), nil
}

// image is a Nydus image in a registry.
type image struct {
	layers []layer.Descriptor
	blobs  map[digest.Digest]memory
}

// add puts a blob into the registry, and into the manifest if it has an
// annotation.
func (m *image) add(b []byte, annotation, value string) digest.Digest {
	if m.blobs == nil {
		m.blobs = map[digest.Digest]memory{}
	}
	d := digest.FromBytes(b)
	m.blobs[d] = b
	if annotation != "" {
		m.layers = append(m.layers, layer.Descriptor{Digest: d, Size: int64(len(b)), Annotations: map[string]string{annotation: value}})
	}
	return d
}

func (m *image) open(ctx context.Context) (*index.Layer, error) {
	return nydus.Open(ctx, m.layers, func(d layer.Descriptor) layer.Blob { return m.blobs[d.Digest] })
}

// load reads an image from a directory: the bootstrap layer boot.tar.gz, data
// layers that end in .blob, and layers outside of the manifest that end in
// .ref.
func load(t testing.TB, dir string) *image {
	t.Helper()
	m := new(image)
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no image in %s: %v", dir, err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		switch filepath.Ext(name) {
		case ".blob":
			m.add(b, nydus.BlobAnnotation, "true")
		case ".ref":
			m.add(b, "", "")
		default:
			m.add(b, nydus.BootstrapAnnotation, "true")
		}
	}
	return m
}

// packBoot makes the layer of a bootstrap.
func packBoot(t testing.TB, boot []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := stdgzip.NewWriterLevel(&b, stdgzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for _, h := range []tar.Header{{Name: "image/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "image/image.boot", Typeflag: tar.TypeReg, Mode: 0o444, Size: int64(len(boot))}} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write(boot); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// segment reads the whole segment and verifies every chunk, each by itself as
// well.
func (m *image) segment(t *testing.T, l *index.Layer) []byte {
	t.Helper()
	r := layer.NewReader(l, func(ref index.BlobRef) layer.Blob { return m.blobs[ref.Digest] })
	read := func(off, n int64) []byte {
		t.Helper()
		s, err := r.Open(t.Context(), off, n)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		b, err := io.ReadAll(s)
		if err != nil || int64(len(b)) != n {
			t.Fatalf("range %d+%d: %d bytes, %v", off, n, len(b), err)
		}
		return b
	}
	seg := read(0, l.Table.Size)
	for i, c := range l.Table.Chunks {
		if l.Table.Algorithm.Sum(seg[c.Off:c.End()]) != c.Sum {
			t.Fatalf("chunk %d, piece %+v, does not have its digest", i, l.Access.Pieces[i])
		}
		if b := read(c.Off, c.Len); !bytes.Equal(b, seg[c.Off:c.End()]) {
			t.Fatalf("chunk %d by itself is not the same", i)
		}
	}
	for _, ref := range l.Access.Blobs {
		if b, ok := m.blobs[ref.Digest]; !ok || b.Size() != ref.Size {
			t.Errorf("blob %s of %d bytes, has %d", ref.Digest, ref.Size, b.Size())
		}
	}
	return seg
}

// check opens the image and compares it with a tree. Times of the root are not
// kept by nydus-image, and it gives directories that a tar does not have
// attributes of its own.
func (m *image) check(t *testing.T, tree map[string]want) *index.Layer {
	t.Helper()
	l, err := m.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seg := m.segment(t, l)
	first := map[string]string{} // names of files, by their first name in the tar
	byPath := map[string]index.Entry{}
	for _, e := range l.Entries {
		w, ok := tree[e.Path]
		if !ok {
			t.Errorf("%q is not in the tree", e.Path)
			continue
		}
		if e.Kind == index.Hardlink {
			if first[w.file] != e.Link {
				t.Errorf("%q is a link to %q, want %q", e.Path, e.Link, first[w.file])
			}
			e = byPath[e.Link]
		} else {
			if other, ok := first[w.file]; ok {
				t.Errorf("%q is not a link to %q", e.Path, other)
			}
			first[w.file] = e.Path
			byPath[e.Path] = e
		}
		if !bytes.Equal(seg[e.Off:e.Off+e.Size], w.data) {
			t.Errorf("%q has other content", e.Path)
		}
		e.Off, e.Path = 0, ""
		if e.Kind == index.Dir && (w.file == "" || w.file == "upper:") {
			e.Sec, e.Nsec = w.Sec, w.Nsec
		}
		if g, want := fmt.Sprintf("%+v", e), fmt.Sprintf("%+v", w.Entry); g != want {
			t.Errorf("%.60q\n got %.400s\nwant %.400s", w.file, g, want)
		}
	}
	if len(l.Entries) != len(tree) {
		t.Errorf("%d entries, want %d", len(l.Entries), len(tree))
	}
	if _, err := bootstrap.Build(l.Blob, []*index.Layer{l}); err != nil {
		t.Error(err)
	}
	return l
}

// TestOpen opens images that nydus-image made of tree.
func TestOpen(t *testing.T) {
	names, err := filepath.Glob("testdata/*/boot.tar.gz")
	if err != nil || len(names) == 0 {
		t.Fatalf("no images: %v", err)
	}
	for _, name := range names {
		dir := filepath.Dir(name)
		c := caseOf(filepath.Base(dir))
		if c == nil {
			t.Errorf("%s is not an image that is known", dir)
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			load(t, dir).check(t, c.want(t))
		})
	}
}

// TestCodecs makes sure that the images of testdata have what their names say.
func TestCodecs(t *testing.T) {
	cases := []struct {
		name  string
		codec index.Codec
		also  string // what else there must be
	}{
		{"v5-zstd-blake3", index.ZstdFrame, ""},
		{"v5-lz4-sha256", index.LZ4Block, ""},
		{"v6-zstd-blake3", index.ZstdFrame, "prefetch"},
		{"v6-lz4-sha256", index.LZ4Block, ""},
		{"v6-none", index.Stored, ""},
		{"v6-zran", index.Deflate, "windows"},
		{"v6-merge", index.ZstdFrame, "blobs"},
		{"v6-batch-zstd", index.ZstdFrame, "inner"},
		{"v6-batch-lz4-toc", index.LZ4Block, "inner"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l, err := load(t, filepath.Join("testdata", c.name)).open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			has := map[string]bool{"": true, "prefetch": len(l.Prefetch) > 0, "blobs": len(l.Access.Blobs) == 2}
			found := false
			for _, p := range l.Access.Pieces {
				found = found || p.Codec == c.codec
				has["inner"] = has["inner"] || p.Inner > 0
				if p.Codec == index.Deflate {
					x := l.Access.Checkpoints[p.Point]
					has["windows"] = has["windows"] || len(x.Window) > 0 && x.Bit%8 != 0
				}
			}
			if !found || !has[c.also] {
				t.Errorf("codec %d: %v, %s: %v", c.codec, found, c.also, has[c.also])
			}
		})
	}
}
