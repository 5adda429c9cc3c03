package soci

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// blob is a Blob in memory.
type blob []byte

func (b blob) Size() int64 { return int64(len(b)) }

func (b blob) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	if off < 0 || n < 0 || off+n > b.Size() {
		return nil, fmt.Errorf("range %d+%d of %d", off, n, b.Size())
	}
	return io.NopCloser(bytes.NewReader(b[off : off+n])), nil
}

func (b blob) desc() layer.Descriptor {
	return layer.Descriptor{Digest: digest.FromBytes(b), Size: b.Size()}
}

// openNode opens a ztoc that is written here.
func openNode(b blob, n node) (*index.Layer, error) {
	z := write(n)
	return Open(z, digest.FromBytes(z), b.desc())
}

func noise(n int) []byte {
	rnd := rand.New(rand.NewPCG(5, 6))
	b := make([]byte, 0, n+16)
	for len(b) < n {
		b = fmt.Appendf(b, "%x ", rnd.Uint32())
	}
	return b[:n]
}

// sample is a plain layer with all kinds of entries, and so many files more.
func sample(tb testing.TB, files int) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h *tar.Header, n int) {
		h.Size, h.ModTime, h.Format = int64(n), time.Unix(1700000000, 5), tar.FormatPAX
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write(noise(n)); err != nil {
			tb.Fatal(err)
		}
	}
	add(&tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, 0)
	add(&tar.Header{Name: "./etc/", Typeflag: tar.TypeDir, Mode: 0o2755, Uid: 3, Gid: 1 << 22}, 0)
	add(&tar.Header{Name: "/etc/small", Mode: 0o4711, PAXRecords: map[string]string{
		"SCHILY.xattr.user.b": "\xff", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02", "SCHILY.xattr.com.apple.x": "y",
	}}, 100)
	add(&tar.Header{Name: "etc/empty", Mode: 0o644}, 0)
	add(&tar.Header{Name: "etc/large", Mode: 0o644}, 700_000)
	add(&tar.Header{Name: "etc/unit", Mode: 0o644}, index.UnitSize)
	add(&tar.Header{Name: "etc/hard", Typeflag: tar.TypeLink, Linkname: "./etc/large"}, 0)
	add(&tar.Header{Name: "etc/soft", Typeflag: tar.TypeSymlink, Linkname: "../x/./y"}, 0)
	add(&tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, 0)
	add(&tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 70000}, 0)
	add(&tar.Header{Name: "pipe", Typeflag: tar.TypeFifo}, 0)
	add(&tar.Header{Name: "etc/.wh.gone", Mode: 0o644}, 700)
	add(&tar.Header{Name: "var/.wh..wh..opq"}, 0)
	add(&tar.Header{Name: ".wh..wh.aufs"}, 0)
	for i := range files {
		add(&tar.Header{Name: fmt.Sprintf("f/%d", i), Mode: 0o600}, i*i*41%9000)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func packed(tb testing.TB, plain []byte) blob {
	tb.Helper()
	var b bytes.Buffer
	w, err := stdgzip.NewWriterLevel(&b, stdgzip.BestSpeed)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(plain); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// TestReal opens the ztocs that the real tool made.
func TestReal(t *testing.T) {
	img := loadReal(t)
	ztocs := img.ztocs(t)
	spans := []int{9, 2, 2}
	for i, desc := range img.manifest.Layers {
		t.Run(fmt.Sprint("layer ", i+1), func(t *testing.T) {
			b, z := blob(img.blobs[desc.Digest]), ztocs[desc.Digest]
			l, err := Open(img.blobs[z], z, desc)
			if err != nil {
				t.Fatal(err)
			}
			if n := len(l.Access.Spans); n < spans[i] {
				t.Errorf("%d spans", n)
			}
			sameAsBuilt(t, l, b)
			// Our own writer, which other tests use, tells the same.
			own, err := openNode(b, ztocOf(t, b, options{span: 16384}))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(own.Entries, l.Entries) || !reflect.DeepEqual(own.Access.Extents, l.Access.Extents) {
				t.Error("our own writer made a ztoc that tells something else")
			}
		})
	}
}

// TestOpen opens ztocs that are written here.
func TestOpen(t *testing.T) {
	plain := sample(t, 60)
	cases := []struct {
		name string
		blob blob
		opts options
	}{
		{"gzip", packed(t, plain), options{span: 64 << 10}},
		{"first version", packed(t, plain), options{span: 64 << 10, v1: true}},
		{"one span", packed(t, plain), options{span: 1 << 30}},
		{"one span, first version", packed(t, plain), options{span: 1 << 30, v1: true}},
		{"members", append(packed(t, plain[:100_001]), packed(t, plain[100_001:])...), options{span: 64 << 10}},
		{"plain tar", plain, options{span: 50_000}},
		{"plain tar, one span", plain, options{span: 1 << 30}},
		{"padding", packed(t, append(plain[:len(plain):len(plain)], make([]byte, 200_000)...)), options{span: 64 << 10}},
		{"no files", packed(t, make([]byte, 1024)), options{span: 1 << 20}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l, err := openNode(c.blob, ztocOf(t, c.blob, c.opts))
			if err != nil {
				t.Fatal(err)
			}
			sameAsBuilt(t, l, c.blob)
		})
	}
}

// sameAsBuilt compares a layer with what reading the whole blob tells.
func sameAsBuilt(t *testing.T, l *index.Layer, b blob) {
	t.Helper()
	var seg bytes.Buffer
	want, err := layer.Build(t.Context(), bytes.NewReader(b), b.desc(), &seg, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(l.Entries, want.Entries) {
		t.Errorf("entries\n%.2000v\nwant\n%.2000v", l.Entries, want.Entries)
	}
	if l.Blob != want.Blob || l.BlobSize != want.BlobSize || l.Table.Size != want.Table.Size {
		t.Errorf("blob %s of %d, segment of %d bytes", l.Blob, l.BlobSize, l.Table.Size)
	}
	if err := l.Validate(); err != nil {
		t.Error(err)
	}
	checkChunks(t, l, seg.Bytes())
	checkSpans(t, l, b)
	readAll(t, l, b, seg.Bytes())
}

// checkChunks checks that chunks cover all that is not zero, and their names.
func checkChunks(t *testing.T, l *index.Layer, seg []byte) {
	t.Helper()
	rest, names := bytes.Clone(seg), map[index.Sum]bool{}
	for _, c := range l.Table.Chunks {
		clear(rest[c.Off:c.End()])
		if names[c.Sum] || c.Len > index.UnitSize {
			t.Errorf("chunk %+v", c)
		}
		names[c.Sum] = true
	}
	if bytes.ContainsFunc(rest, func(r rune) bool { return r != 0 }) {
		t.Error("bytes in no chunk")
	}
}

// checkSpans checks that the spans have the digests that the blob's bytes have,
// and that they cover whatever is read from a checkpoint on.
func checkSpans(t *testing.T, l *index.Layer, b blob) {
	t.Helper()
	end := int64(0)
	for i, s := range l.Access.Spans {
		if i == 0 {
			end = s.Off
		}
		if s.Off > end || s.Sum != index.SHA256.Sum(b[s.Off:s.End()]) {
			t.Errorf("span %d: %+v", i, s)
		}
		end = s.End()
	}
	if end != b.Size() {
		t.Errorf("spans end at %d of %d", end, b.Size())
	}
}

// readAll reads the segment as a whole and in pieces.
func readAll(t *testing.T, l *index.Layer, b blob, want []byte) {
	t.Helper()
	r := layer.NewReader(l, layer.OneBlob(b))
	for _, n := range []int{len(want), 100_000, 4096 * 7} {
		for off := 0; off < len(want); off += n {
			n := min(n, len(want)-off)
			s, err := r.Open(t.Context(), int64(off), int64(n))
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(s)
			if err != nil || !bytes.Equal(got, want[off:off+n]) {
				t.Fatalf("%d bytes at %d differ, error %v", n, off, err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestDamagedBlob flips a byte of each span in turn.
func TestDamagedBlob(t *testing.T) {
	img := loadReal(t)
	ztocs := img.ztocs(t)
	for i, desc := range img.manifest.Layers {
		b, z := blob(img.blobs[desc.Digest]), ztocs[desc.Digest]
		l, err := Open(img.blobs[z], z, desc)
		if err != nil {
			t.Fatal(err)
		}
		var seg bytes.Buffer
		if _, err := layer.Build(t.Context(), bytes.NewReader(b), desc, &seg, layer.Options{}); err != nil {
			t.Fatal(err)
		}
		for k, s := range l.Access.Spans {
			bad := bytes.Clone(b)
			bad[s.Off+s.Len/2] ^= 1
			// The last span can have no more than the end of the tar.
			if n := readDamaged(t, l, bad, seg.Bytes()); n == 0 && k < len(l.Access.Spans)-1 {
				t.Errorf("layer %d, span %d: no chunk has an error", i+1, k)
			}
		}
	}
}

// readDamaged reads all chunks of a blob that is not right, and returns how
// many have an error. No wrong byte may come out.
func readDamaged(t *testing.T, l *index.Layer, bad blob, want []byte) (failed int) {
	t.Helper()
	r := layer.NewReader(l, layer.OneBlob(bad))
	for _, c := range l.Table.Chunks {
		s, err := r.Open(t.Context(), c.Off, c.Len)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(s)
		if !bytes.HasPrefix(want[c.Off:c.End()], got) || err == nil && int64(len(got)) != c.Len {
			t.Errorf("chunk at %d: wrong bytes, error %v", c.Off, err)
		}
		if err != nil {
			failed++
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), l.Blob.String()) {
				t.Errorf("chunk at %d: %v", c.Off, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	return failed
}

// TestNames checks that names of chunks depend on the ztoc and on nothing else.
func TestNames(t *testing.T) {
	b := packed(t, sample(t, 60))
	first, err := openNode(b, ztocOf(t, b, options{span: 64 << 10}))
	if err != nil {
		t.Fatal(err)
	}
	n := ztocOf(t, b, options{span: 64 << 10})
	n[1] = "another tool"
	second, err := openNode(b, n)
	if err != nil {
		t.Fatal(err)
	}
	if first.Table.Algorithm != index.Vouched || first.Table.Chunks[0].Sum == second.Table.Chunks[0].Sum {
		t.Error("two ztocs name a chunk alike")
	}
}

// TestDamagedZtoc flips every bit of a byte here and there in a ztoc.
func TestDamagedZtoc(t *testing.T) {
	img := loadReal(t)
	desc := img.manifest.Layers[0]
	z := img.ztocs(t)[desc.Digest]
	for at := 0; at < len(img.blobs[z]); at += 997 {
		bad := bytes.Clone(img.blobs[z])
		bad[at] ^= 0xff
		l, err := Open(bad, z, desc)
		if l != nil || !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), desc.Digest.String()) {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
}
