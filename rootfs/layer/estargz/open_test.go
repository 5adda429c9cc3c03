package estargz

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	builder "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// blob is a Blob in memory that counts requests.
type blob struct {
	data     []byte
	requests int
}

func (b *blob) Size() int64 { return int64(len(b.data)) }

func (b *blob) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	b.requests++
	if off < 0 || n < 0 || off+n > b.Size() {
		return nil, fmt.Errorf("range %d+%d of %d", off, n, b.Size())
	}
	return io.NopCloser(bytes.NewReader(b.data[off : off+n])), nil
}

func (b *blob) desc() layer.Descriptor {
	return layer.Descriptor{Digest: digest.FromBytes(b.data), Size: b.Size()}
}

func noise(n int) []byte {
	rnd := rand.New(rand.NewPCG(5, 6))
	b := make([]byte, 0, n+64)
	for len(b) < n {
		b = fmt.Appendf(b, "%x ", rnd.Uint32())
	}
	return b[:n]
}

// sample is a layer with everything that a TOC can say, and files more.
func sample(tb testing.TB, files int) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	at := time.Unix(1700000000, 0)
	write := func(h *tar.Header, n int) {
		h.Size, h.ModTime, h.Format = int64(n), at, tar.FormatPAX
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write(noise(n)); err != nil {
			tb.Fatal(err)
		}
	}
	write(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o2755, Uid: 3, Gid: 1 << 22}, 0)
	write(&tar.Header{Name: "etc/small", Mode: 0o4711, PAXRecords: map[string]string{
		"SCHILY.xattr.user.b": "\x00\xff", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02",
	}}, 100)
	write(&tar.Header{Name: "etc/empty"}, 0)
	write(&tar.Header{Name: "etc/large"}, 700_000)
	write(&tar.Header{Name: "etc/block"}, 4096)
	write(&tar.Header{Name: "etc/hard", Typeflag: tar.TypeLink, Linkname: "etc/large"}, 0)
	write(&tar.Header{Name: "etc/soft", Typeflag: tar.TypeSymlink, Linkname: "../x/./y"}, 0)
	write(&tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, 0)
	write(&tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 70000}, 0)
	write(&tar.Header{Name: "pipe", Typeflag: tar.TypeFifo}, 0)
	write(&tar.Header{Name: "etc/.wh.gone"}, 0)
	write(&tar.Header{Name: "var/.wh..wh..opq"}, 0)
	write(&tar.Header{Name: "f/", Typeflag: tar.TypeDir, Mode: 0o755}, 0)
	for i := range files {
		write(&tar.Header{Name: fmt.Sprintf("f/%d", i)}, i*41%5000)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func convert(tb testing.TB, plain []byte, opts ...builder.Option) (*blob, digest.Digest) {
	tb.Helper()
	made, err := builder.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), opts...)
	if err != nil {
		tb.Fatal(err)
	}
	data, err := io.ReadAll(made)
	if err != nil {
		tb.Fatal(err)
	}
	if err := made.Close(); err != nil {
		tb.Fatal(err)
	}
	return &blob{data: data}, made.TOCDigest()
}

func TestOpen(t *testing.T) {
	plain := sample(t, 100)
	cases := map[string][]builder.Option{
		"default":      nil,
		"small chunks": {builder.WithChunkSize(10_000)},
		"inner":        {builder.WithChunkSize(50_000), builder.WithMinChunkSize(200_000)},
		"prioritized":  {builder.WithChunkSize(10_000), builder.WithPrioritizedFiles([]string{"etc/large", "f/7"})},
		"stored":       {builder.WithCompressionLevel(stdgzip.NoCompression)},
	}
	for name, opts := range cases {
		t.Run(name, func(t *testing.T) {
			b, toc := convert(t, plain, opts...)
			l, err := Open(t.Context(), b, b.desc(), toc)
			if err != nil {
				t.Fatal(err)
			}
			if b.requests != 1 {
				t.Errorf("%d requests", b.requests)
			}
			samePlain(t, l, plain, name == "prioritized")
			checkContent(t, l, b, plain)
		})
	}
}

// samePlain compares entries with those of the tar that was converted.
func samePlain(t *testing.T, l *index.Layer, plain []byte, reordered bool) {
	t.Helper()
	want, err := layer.Build(t.Context(), bytes.NewReader(plain),
		layer.Descriptor{Digest: digest.FromBytes(plain), Size: int64(len(plain))}, io.Discard, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	byPath := map[string]string{}
	for _, e := range want.Entries {
		if reordered {
			e.Off = 0
		}
		byPath[fmt.Sprint(e.Kind, e.Path)] = fmt.Sprintf("%+v", e)
	}
	if len(l.Entries) != len(want.Entries) || l.Table.Size != want.Table.Size {
		t.Errorf("%d entries, %d bytes; want %d, %d", len(l.Entries), l.Table.Size, len(want.Entries), want.Table.Size)
	}
	for _, e := range l.Entries {
		if reordered {
			e.Off = 0
		}
		if g, w := fmt.Sprintf("%+v", e), byPath[fmt.Sprint(e.Kind, e.Path)]; g != w {
			t.Errorf("entry\n got %s\nwant %s", g, w)
		}
	}
}

// checkContent reads the segment in several ways, verifies every chunk, and
// compares files with the tar.
func checkContent(t *testing.T, l *index.Layer, b *blob, plain []byte) {
	t.Helper()
	r := layer.NewReader(l, layer.OneBlob(b))
	read := func(off, n int64) []byte {
		t.Helper()
		s, err := r.Open(t.Context(), off, n)
		if err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(s)
		if err != nil || int64(len(p)) != n {
			t.Fatalf("range %d+%d: %d bytes, %v", off, n, len(p), err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	b.requests = 0
	seg := read(0, l.Table.Size)
	if b.requests != 1 {
		t.Errorf("%d requests for the whole segment", b.requests)
	}
	for i, c := range l.Table.Chunks {
		if sha256.Sum256(seg[c.Off:c.End()]) != c.Sum {
			t.Fatalf("chunk %d does not have its digest", i)
		}
		if i%7 == 0 && !bytes.Equal(read(c.Off, c.Len), seg[c.Off:c.End()]) {
			t.Fatalf("chunk %d alone is not the same", i)
		}
	}
	rnd := rand.New(rand.NewPCG(7, 8))
	for i := range 60 {
		n := rnd.Int64N(100 << (i % 12))
		off := rnd.Int64N(l.Table.Size - n)
		if !bytes.Equal(read(off, n), seg[off:off+n]) {
			t.Fatalf("range %d+%d is not the same", off, n)
		}
	}
	files := map[string][]byte{}
	for tr := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range l.Entries {
		if e.Kind == index.File && !bytes.Equal(seg[e.Off:e.Off+e.Size], files[e.Path]) {
			t.Fatalf("%s has other content", e.Path)
		}
	}
}

// TestOpenLargeTOC has a TOC that the first request does not cover.
func TestOpenLargeTOC(t *testing.T) {
	toc := []byte(`{"version":1,"entries":[{"name":"d","type":"dir"}`)
	for i := range 16_000 { // digests do not compress
		toc = fmt.Appendf(toc, `,{"name":"%x","type":"reg"}`, sha256.Sum256([]byte{byte(i), byte(i >> 8)}))
	}
	made, d := pack(t, append(toc, "]}"...), false)
	l, err := Open(t.Context(), made, made.desc(), d)
	if err != nil {
		t.Fatal(err)
	}
	if made.requests != 2 || len(l.Entries) != 16_001 {
		t.Errorf("%d requests, %d entries", made.requests, len(l.Entries))
	}
}

// pack makes a blob of nothing but a TOC, for TOCs that no builder makes.
func pack(tb testing.TB, toc []byte, legacy bool) (*blob, digest.Digest) {
	tb.Helper()
	var b bytes.Buffer
	b.Write(make([]byte, 1000)) // where chunks would be
	off := b.Len()
	z := stdgzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Name: tocName, Size: int64(len(toc)), Typeflag: tar.TypeReg}); err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(toc); err != nil {
		tb.Fatal(err)
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		tb.Fatal(err)
	}
	field := fmt.Sprintf("%016x%s", off, magic)
	if !legacy {
		field = "SG\x16\x00" + field
	}
	b.WriteString("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff")
	b.Write([]byte{byte(len(field)), 0})
	b.WriteString(field)
	b.WriteString("\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00")
	return &blob{data: b.Bytes()}, digest.FromBytes(toc)
}

func TestOpenLegacyFooter(t *testing.T) {
	for _, legacy := range []bool{false, true} {
		b, toc := pack(t, []byte(`{"version":1,"entries":[{"name":"a/","type":"dir","mode":493}]}`), legacy)
		l, err := Open(t.Context(), b, b.desc(), toc)
		if err != nil || len(l.Entries) != 1 || l.Entries[0].Path != "a" || l.Entries[0].Mode != 0o755 {
			t.Errorf("legacy %v: %+v, %v", legacy, l, err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	good, toc := convert(t, sample(t, 0))
	change := func(at int) *blob {
		b := &blob{data: bytes.Clone(good.data)}
		b.data[len(b.data)+at] ^= 1
		return b
	}
	cases := []struct {
		name string
		b    *blob
		toc  digest.Digest
		is   func(error) bool
		says string
	}{
		{"no eStargz", &blob{data: noise(5000)}, toc, errdefs.IsInvalidArgument, "no eStargz footer"},
		{"short", &blob{data: noise(10)}, toc, errdefs.IsInvalidArgument, "no eStargz footer"},
		{"empty", &blob{}, toc, errdefs.IsInvalidArgument, "no eStargz footer"},
		{"no digest", good, "", errdefs.IsInvalidArgument, "TOC digest"},
		{"another TOC", good, digest.FromString("x"), errdefs.IsDataLoss, "does not have the digest"},
		{"broken TOC", change(-100), toc, errdefs.IsDataLoss, ""},
		{"offset", change(-20), toc, func(error) bool { return true }, ""},
		{"magic", change(-14), toc, errdefs.IsInvalidArgument, "footer"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := Open(t.Context(), c.b, c.b.desc(), c.toc)
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.b.desc().Digest.String()) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
}

// TestOpenBomb has a TOC that compresses too well.
func TestOpenBomb(t *testing.T) {
	b, toc := pack(t, append([]byte(`{"version":1,"entries":[`), bytes.Repeat([]byte(" "), 64<<20)...), false)
	if _, err := Open(t.Context(), b, b.desc(), toc); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "compressed to") {
		t.Errorf("error %v", err)
	}
}
