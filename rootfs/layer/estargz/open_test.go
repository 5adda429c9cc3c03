package estargz

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	builder "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/toc"
	"github.com/tatami-containers/tatami/tests/layertest"
	"github.com/tatami-containers/tatami/tests/torture"
)

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

func convert(tb testing.TB, plain []byte, opts ...builder.Option) (*layertest.Blob, digest.Digest) {
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
	return &layertest.Blob{Data: data}, made.TOCDigest()
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
			l, err := Open(t.Context(), b, b.Descriptor(nil), toc)
			if err != nil {
				t.Fatal(err)
			}
			if b.Requests.Load() != 1 {
				t.Errorf("%d requests", b.Requests.Load())
			}
			checkLayer(t, l, b, plain, name == "prioritized")
		})
	}
}

// checkLayer compares all of a layer with the tar that it was made of.
func checkLayer(t *testing.T, l *index.Layer, b *layertest.Blob, plain []byte, reordered bool) {
	t.Helper()
	layertest.SameEntries(t, l, plain, layertest.Limits{Seconds: true, Last: reordered, Order: reordered})
	r := layer.NewReader(l, layer.OneBlob(b))
	seg := layertest.Segment(t, l, func(off, n int64) (io.ReadCloser, error) { return r.Open(t.Context(), off, n) })
	layertest.SameContent(t, l, seg, plain)
}

// TestOpenLargeTOC has a TOC that the first request does not cover.
func TestOpenLargeTOC(t *testing.T) {
	toc := []byte(`{"version":1,"entries":[{"name":"d","type":"dir"}`)
	for i := range 16_000 { // digests do not compress
		toc = fmt.Appendf(toc, `,{"name":"%x","type":"reg"}`, sha256.Sum256([]byte{byte(i), byte(i >> 8)}))
	}
	made, d := pack(t, append(toc, "]}"...), false)
	l, err := Open(t.Context(), made, made.Descriptor(nil), d)
	if err != nil {
		t.Fatal(err)
	}
	if made.Requests.Load() != 2 || len(l.Entries) != 16_001 {
		t.Errorf("%d requests, %d entries", made.Requests.Load(), len(l.Entries))
	}
}

// pack makes a blob of nothing but a TOC, for TOCs that no builder makes.
func pack(tb testing.TB, json []byte, legacy bool) (*layertest.Blob, digest.Digest) {
	tb.Helper()
	var b bytes.Buffer
	b.Write(make([]byte, 1000)) // where chunks would be
	off := b.Len()
	z := stdgzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Name: toc.Name, Size: int64(len(json)), Typeflag: tar.TypeReg}); err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(json); err != nil {
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
	return &layertest.Blob{Data: b.Bytes()}, digest.FromBytes(json)
}

func TestOpenLegacyFooter(t *testing.T) {
	for _, legacy := range []bool{false, true} {
		b, toc := pack(t, []byte(`{"version":1,"entries":[{"name":"a/","type":"dir","mode":493}]}`), legacy)
		l, err := Open(t.Context(), b, b.Descriptor(nil), toc)
		if err != nil || len(l.Entries) != 1 || l.Entries[0].Path != "a" || l.Entries[0].Mode != 0o755 {
			t.Errorf("legacy %v: %+v, %v", legacy, l, err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	good, toc := convert(t, sample(t, 0))
	change := func(at int) *layertest.Blob {
		b := &layertest.Blob{Data: bytes.Clone(good.Data)}
		b.Data[len(b.Data)+at] ^= 1
		return b
	}
	cases := []struct {
		name string
		b    *layertest.Blob
		toc  digest.Digest
		is   func(error) bool
		says string
	}{
		{"no eStargz", &layertest.Blob{Data: noise(5000)}, toc, errdefs.IsInvalidArgument, "no eStargz footer"},
		{"short", &layertest.Blob{Data: noise(10)}, toc, errdefs.IsInvalidArgument, "no eStargz footer"},
		{"empty", &layertest.Blob{}, toc, errdefs.IsInvalidArgument, "no eStargz footer"},
		{"no digest", good, "", errdefs.IsInvalidArgument, "TOC digest"},
		{"another TOC", good, digest.FromString("x"), errdefs.IsDataLoss, "does not have the digest"},
		{"broken TOC", change(-100), toc, errdefs.IsDataLoss, ""},
		{"offset", change(-20), toc, func(error) bool { return true }, ""},
		{"magic", change(-14), toc, errdefs.IsInvalidArgument, "footer"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := Open(t.Context(), c.b, c.b.Descriptor(nil), c.toc)
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.b.Descriptor(nil).Digest.String()) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
}

// TestOpenBomb has a TOC that compresses too well.
func TestOpenBomb(t *testing.T) {
	b, toc := pack(t, append([]byte(`{"version":1,"entries":[`), bytes.Repeat([]byte(" "), 64<<20)...), false)
	if _, err := Open(t.Context(), b, b.Descriptor(nil), toc); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "compressed to") {
		t.Errorf("error %v", err)
	}
}

// TestOpenTorture converts layers with everything in them.
func TestOpenTorture(t *testing.T) {
	for i, plain := range torture.Layers() {
		for name, opts := range map[string][]builder.Option{
			"default": nil,
			"inner":   {builder.WithChunkSize(30_000), builder.WithMinChunkSize(100_000)},
		} {
			t.Run(fmt.Sprint(i, " ", name), func(t *testing.T) {
				b, sum := convert(t, plain, opts...)
				l, err := Open(t.Context(), b, b.Descriptor(nil), sum)
				if err != nil {
					t.Fatal(err)
				}
				checkLayer(t, l, b, plain, true)
			})
		}
	}
}

// TestPrefetch has the landmarks that the builder sets.
func TestPrefetch(t *testing.T) {
	plain := sample(t, 20)
	b, sum := convert(t, plain, builder.WithPrioritizedFiles([]string{"etc/large", "f/7"}))
	l, err := Open(t.Context(), b, b.Descriptor(nil), sum)
	if err != nil {
		t.Fatal(err)
	}
	first := map[string]bool{"etc/large": true, "f/7": true}
	end := int64(0)
	for _, e := range l.Entries {
		if first[e.Path] {
			end = max(end, index.RoundUp(e.Off+e.Size))
		}
	}
	if want := []index.Range{{Len: end}}; !slices.Equal(l.Prefetch, want) {
		t.Errorf("prefetch %v, want %v", l.Prefetch, want)
	}
	b, sum = convert(t, plain)
	if l, err = Open(t.Context(), b, b.Descriptor(nil), sum); err != nil || l.Prefetch != nil {
		t.Errorf("without prioritized files: %v, %v", l.Prefetch, err)
	}
}

func TestTOC(t *testing.T) {
	want := digest.FromString("x")
	for _, c := range []struct {
		value string
		ok    bool
	}{{want.String(), true}, {"", false}, {"sha256:1", false}, {"x", false}} {
		if got, ok := TOC(map[string]string{TOCDigest: c.value}); ok != c.ok || ok && got != want {
			t.Errorf("%q: %s, %v", c.value, got, ok)
		}
	}
}

func FuzzFooter(f *testing.F) {
	for _, legacy := range []bool{false, true} {
		b, _ := pack(f, nil, legacy)
		f.Add(b.Data[len(b.Data)-60:])
	}
	external, _, _ := convertExternal(f, sample(f, 0))
	f.Add(external.Data[len(external.Data)-60:])
	f.Fuzz(func(t *testing.T, tail []byte) {
		size, off, err := parseFooter(tail)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
				t.Fatal(err)
			}
			return
		}
		if off < 0 || size > int64(len(tail)) ||
			!bytes.Contains(bytes.ToLower(tail[int64(len(tail))-size:]), fmt.Appendf(nil, "%016xstargz", off)) {
			t.Fatalf("footer of %d bytes, TOC at %d", size, off)
		}
	})
}
