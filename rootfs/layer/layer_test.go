package layer_test

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

func newRand() *rand.Rand { return rand.New(rand.NewPCG(3, 4)) }

// content is n bytes that compress somewhat.
func content(n int) []byte {
	rnd := newRand()
	b := make([]byte, 0, n+64)
	for len(b) < n {
		b = fmt.Appendf(b, "%d %x\n", len(b), rnd.Uint32N(1<<20))
	}
	return b[:n]
}

// sizes of files around every boundary that matters.
func sizes() []int {
	s := []int{0, 1, 511, 512, 4095, 4096, 4097, 65535, 65536, 65537, 2 << 20, 200_000, 0, 7}
	for i := range 150 {
		s = append(s, i*37)
	}
	return s
}

// sampleTar and sampleGzip are made once, for that takes longer than most tests.
var (
	sampleTar  = sync.OnceValue(writeTar)
	sampleGzip = sync.OnceValue(func() []byte { return compress(sampleTar(), 1) })
)

// must is for writes to memory, which do not fail.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// writeTar is a layer with a file of every size, and one that is mostly zeros.
func writeTar() []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	write := func(h *tar.Header, data []byte) {
		h.Mode, h.Size = 0o644, int64(len(data))
		must(w.WriteHeader(h))
		_, err := w.Write(data)
		must(err)
	}
	write(&tar.Header{Name: "usr/", Typeflag: tar.TypeDir}, nil)
	all := content(2 << 20)
	for i, n := range sizes() {
		write(&tar.Header{Name: fmt.Sprintf("usr/%d", i)}, all[:n])
		write(&tar.Header{Name: fmt.Sprintf("usr/link%d", i), Typeflag: tar.TypeLink, Linkname: fmt.Sprintf("usr/%d", i)}, nil)
	}
	zeros := make([]byte, 1<<20)
	zeros[700_000] = 1
	write(&tar.Header{Name: "zeros"}, zeros)
	must(w.Close())
	return b.Bytes()
}

func compress(plain []byte, members int) []byte {
	var b bytes.Buffer
	for i := range members {
		w := stdgzip.NewWriter(&b)
		_, err := w.Write(plain[len(plain)*i/members : len(plain)*(i+1)/members])
		must(err)
		must(w.Close())
	}
	return b.Bytes()
}

var zstdEncoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil)
	must(err)
	return e
})

// zstdFrames is plain in frames of up to n bytes each.
func zstdFrames(plain []byte, n int) []byte {
	var b []byte
	for part := range slices.Chunk(plain, n) {
		b = zstdEncoder().EncodeAll(part, b)
	}
	return b
}

func describe(blob []byte) layer.Descriptor {
	return layer.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip",
		Digest: digest.FromBytes(blob), Size: int64(len(blob))}
}

// memoryBlob is a Blob that counts what it is asked for.
type memoryBlob struct {
	data []byte

	mu       sync.Mutex
	requests int
	asked    int64
	open     int
}

func (b *memoryBlob) Size() int64 { return int64(len(b.data)) }

func (b *memoryBlob) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.requests++
	b.asked += n
	if off < 0 || n <= 0 || off+n > int64(len(b.data)) {
		return nil, fmt.Errorf("range %d+%d of %d", off, n, len(b.data))
	}
	b.open++
	return &rangeBody{bytes.NewReader(b.data[off : off+n]), b}, nil
}

type rangeBody struct {
	io.Reader
	b *memoryBlob
}

func (r *rangeBody) Close() error {
	r.b.mu.Lock()
	defer r.b.mu.Unlock()
	r.b.open--
	return nil
}

// segmentBuffer is a writer that takes zeros as such.
type segmentBuffer struct {
	bytes.Buffer
	zeros int64
}

func (s *segmentBuffer) WriteZeros(n int64) error {
	s.zeros += n
	_, err := s.Write(make([]byte, n))
	return err
}

func TestBuild(t *testing.T) {
	plain := sampleTar()
	blobs := map[string][]byte{
		"tar":               plain,
		"tar with padding":  append(bytes.Clone(plain), make([]byte, 5000)...),
		"gzip":              sampleGzip(),
		"gzip, many":        compress(plain, 40),
		"gzip with padding": compress(append(bytes.Clone(plain), make([]byte, 500_000)...), 1),
		"zstd":              zstdFrames(plain, len(plain)),
		"zstd, many":        zstdFrames(plain, 70_000),
		"zstd with padding": zstdFrames(append(bytes.Clone(plain), make([]byte, 500_000)...), 1<<20),
	}
	var first *index.Layer
	for name, blob := range blobs {
		t.Run(name, func(t *testing.T) {
			var seg segmentBuffer
			var progress int64
			l, err := layer.Build(t.Context(), iotest.HalfReader(bytes.NewReader(blob)), describe(blob), &seg,
				layer.Options{Span: 100_000, Progress: func(n int64) { progress = n }})
			if err != nil {
				t.Fatal(err)
			}
			if progress != int64(len(blob)) || l.Blob != digest.FromBytes(blob) || l.BlobSize != int64(len(blob)) {
				t.Errorf("progress %d, blob %s, size %d", progress, l.Blob, l.BlobSize)
			}
			wantDiff := digest.FromBytes(plain)
			if strings.Contains(name, "with padding") {
				wantDiff = l.DiffID
			}
			if name == "tar with padding" && l.DiffID != l.Blob || l.DiffID != wantDiff {
				t.Errorf("diffID %s, want %s", l.DiffID, wantDiff)
			}
			if err := l.Validate(); err != nil {
				t.Error(err)
			}
			checkTable(t, l, seg.Bytes())
			checkFiles(t, l, seg.Bytes())
			if seg.zeros < 900_000 {
				t.Errorf("only %d bytes were written as zeros", seg.zeros)
			}
			checkReader(t, l, blob, seg.Bytes())
			if first == nil {
				first = l
			}
			if fmt.Sprint(first.Table) != fmt.Sprint(l.Table) || fmt.Sprint(first.Entries) != fmt.Sprint(l.Entries) {
				t.Error("table or entries depend on how the layer is packed")
			}
		})
	}
}

func checkFiles(t *testing.T, l *index.Layer, seg []byte) {
	t.Helper()
	all := content(2 << 20)
	for i, n := range sizes() {
		e := l.Entries[1+2*i]
		if e.Path != fmt.Sprintf("usr/%d", i) || e.Size != int64(n) || !bytes.Equal(seg[e.Off:e.Off+e.Size], all[:n]) {
			t.Fatalf("entry %+v is not file %d of %d bytes", e, i, n)
		}
	}
}

// checkReader reads ranges out of the blob and compares them with the segment.
func checkReader(t *testing.T, l *index.Layer, blob, seg []byte) {
	t.Helper()
	b := &memoryBlob{data: blob}
	r := layer.NewReader(l, layer.OneBlob(b))
	read := func(off, n int) {
		t.Helper()
		s, err := r.Open(t.Context(), int64(off), int64(n))
		if err != nil {
			t.Fatal(err)
		}
		got := bytes.Repeat([]byte{0xaa}, n)
		if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, seg[off:off+n]) {
			t.Fatalf("range %d+%d is not that of the segment; %v", off, n, err)
		}
		if k, err := s.Read(make([]byte, 1)); k != 0 || err != io.EOF {
			t.Fatalf("range %d+%d goes on: %d, %v", off, n, k, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	read(0, len(seg))
	if b.requests != 1 {
		t.Errorf("%d requests for the whole segment", b.requests)
	}
	read(len(seg), 0)
	for _, c := range l.Access.Checkpoints { // what ends where the next block begins
		for _, x := range l.Access.Extents {
			if n := c.Out - x.Tar; n > 0 && n <= x.Len {
				read(int(x.Seg), int(n))
			}
		}
	}
	rnd := newRand()
	for i := range 100 {
		n := rnd.IntN(100 << (i % 13))
		read(rnd.IntN(len(seg)-n), n)
	}
	for _, c := range l.Table.Chunks[:min(len(l.Table.Chunks), 20)] {
		read(int(c.Off), int(c.Len))
	}
	if b.open != 0 {
		t.Errorf("%d requests were not closed", b.open)
	}
}

// TestReaderAsksForLittle holds what the checkpoints are for.
func TestReaderAsksForLittle(t *testing.T) {
	blob := sampleGzip()
	var seg bytes.Buffer
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), &seg, layer.Options{Span: 100_000})
	if err != nil {
		t.Fatal(err)
	}
	b := &memoryBlob{data: blob}
	r := layer.NewReader(l, layer.OneBlob(b))
	big := l.Entries[1+2*10] // the file of 2 MiB
	s, err := r.Open(t.Context(), big.Off+1<<19, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, s); err != nil {
		t.Fatal(err)
	}
	// Blocks of this data are up to some 100 kB plain: a span, the range and
	// a span behind it, with room for blocks that go over a span's end.
	if limit := int64(len(blob)) / 5; b.requests != 1 || b.asked > limit {
		t.Errorf("%d requests for %d bytes of %d, want one for less than %d", b.requests, b.asked, len(blob), limit)
	}
	zeros := l.Entries[len(l.Entries)-1]
	b.requests = 0
	if s, err = r.Open(t.Context(), zeros.Off+zeros.Size, l.Table.Size-zeros.Off-zeros.Size); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, s); err != nil || b.requests != 0 {
		t.Errorf("%d requests for padding, %v", b.requests, err)
	}
}

// TestReaderAsksForFrames holds that of many zstd frames only those of a range
// are asked for.
func TestReaderAsksForFrames(t *testing.T) {
	blob := zstdFrames(sampleTar(), 64<<10)
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), io.Discard, layer.Options{Span: 100_000})
	if err != nil {
		t.Fatal(err)
	}
	b := &memoryBlob{data: blob}
	s, err := layer.NewReader(l, layer.OneBlob(b)).Open(t.Context(), l.Table.Size/3, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := io.Copy(io.Discard, s); err != nil {
		t.Fatal(err)
	}
	if limit := int64(len(blob)) / 10; b.requests != 1 || b.asked > limit {
		t.Errorf("%d requests for %d bytes of %d, want one for less than %d", b.requests, b.asked, len(blob), limit)
	}
}

func TestOpenErrors(t *testing.T) {
	blob := sampleGzip()
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), io.Discard, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r := layer.NewReader(l, layer.OneBlob(&memoryBlob{data: blob}))
	for _, c := range [][2]int64{{-1, 1}, {0, -1}, {0, l.Table.Size + 1}, {l.Table.Size + 1, 0}, {1, 1<<63 - 1}} {
		if _, err := r.Open(t.Context(), c[0], c[1]); !errdefs.IsInvalidArgument(err) {
			t.Errorf("range %v: %v", c, err)
		}
	}
	// The blob changed or was cut: an error, never fewer bytes.
	for _, data := range [][]byte{blob[:len(blob)/2], make([]byte, len(blob))} {
		s, err := layer.NewReader(l, layer.OneBlob(&memoryBlob{data: data})).Open(t.Context(), 0, l.Table.Size)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, s); err == nil || !strings.Contains(err.Error(), l.Blob.String()) {
			t.Errorf("%d bytes, %v", n, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Read(make([]byte, 1)); err == nil {
			t.Error("read after close works")
		}
	}
}

func TestBuildErrors(t *testing.T) {
	plain := sampleTar()
	gz := sampleGzip()
	garbage := compress(content(5000), 1)
	flipped := bytes.Clone(gz)
	flipped[len(flipped)/2] ^= 4
	broke := bytes.Clone(gz)
	broke[10] |= 6 // no such type of block
	broken := errors.New("connection reset")
	badZstd := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0}, bytes.Repeat([]byte{0xff}, 100)...)
	flippedZstd := zstdFrames(plain, 100_000)
	flippedZstd[len(flippedZstd)/2] ^= 4
	zstdOfNoTar := zstdFrames(content(200_000), 1<<20)
	zz := zstdFrames(plain, 100_000)
	cut := compress(plain[:100_000], 1)
	cases := []struct {
		name string
		r    io.Reader
		desc layer.Descriptor
		is   func(error) bool
		says string
	}{
		{"another blob", bytes.NewReader(compress(plain, 2)), describe(gz), errdefs.IsDataLoss, "bytes"},
		{"another blob of that size", bytes.NewReader(plain), withDigest(describe(plain), digest.FromString("x")), errdefs.IsDataLoss, "another digest"},
		{"one bit", bytes.NewReader(flipped), describe(gz), errdefs.IsDataLoss, "another digest"},
		{"truncated", bytes.NewReader(gz[:len(gz)-100]), describe(gz), errdefs.IsDataLoss, "ends after"},
		{"truncated tar", bytes.NewReader(plain[:len(plain)-512]), describe(plain), errdefs.IsDataLoss, "ends after"},
		{"empty", strings.NewReader(""), describe(gz), errdefs.IsDataLoss, "ends after 0"},
		{"too long", io.MultiReader(bytes.NewReader(plain), strings.NewReader("x")), describe(plain), errdefs.IsDataLoss, "longer"},
		{"corrupt gzip", bytes.NewReader(broke), describe(broke), errdefs.IsDataLoss, "gzip"},
		{"garbage in another blob", bytes.NewReader(garbage), withDigest(describe(garbage), describe(gz).Digest), errdefs.IsDataLoss, "another digest"},
		{"gzip of no tar", bytes.NewReader(garbage), describe(garbage), errdefs.IsInvalidArgument, "checksum"},
		{"gzip of half a tar", bytes.NewReader(cut), describe(cut), errdefs.IsInvalidArgument, "EOF"},
		{"source", io.MultiReader(bytes.NewReader(gz[:9000]), iotest.ErrReader(broken)), describe(gz), func(err error) bool { return errors.Is(err, broken) }, ""},
		{"zstd with a window of terabytes", bytes.NewReader(badZstd), describe(badZstd), errdefs.IsInvalidArgument, "--long"},
		{"corrupt zstd", bytes.NewReader(flippedZstd), describe(flippedZstd), errdefs.IsDataLoss, "zstd frame at byte"},
		{"corrupt zstd in another blob", bytes.NewReader(flippedZstd), describe(zz), errdefs.IsDataLoss, "another digest"},
		{"zstd of no tar", bytes.NewReader(zstdOfNoTar), describe(zstdOfNoTar), errdefs.IsInvalidArgument, "checksum"},
		{"truncated zstd", bytes.NewReader(zz[:len(zz)-100]), describe(zz), errdefs.IsDataLoss, "ends after"},
		{"zstd source", io.MultiReader(bytes.NewReader(zz[:9000]), iotest.ErrReader(broken)), describe(zz), func(err error) bool { return errors.Is(err, broken) }, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := layer.Build(t.Context(), c.r, c.desc, io.Discard, layer.Options{})
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.desc.Digest.String()) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
}

func withDigest(d layer.Descriptor, to digest.Digest) layer.Descriptor {
	d.Digest = to
	return d
}

func TestBuildSegmentError(t *testing.T) {
	full := errors.New("no space left on device")
	for _, blob := range [][]byte{sampleTar(), sampleGzip(), zstdFrames(sampleTar(), 1<<20)} {
		r, w := io.Pipe()
		if err := r.CloseWithError(full); err != nil {
			t.Fatal(err)
		}
		if _, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), w, layer.Options{}); !errors.Is(err, full) {
			t.Errorf("error %v", err)
		}
	}
}

// TestBuildCancelled holds that Build ends with its context.
func TestBuildCancelled(t *testing.T) {
	for _, blob := range [][]byte{sampleTar(), sampleGzip(), zstdFrames(sampleTar(), 1<<20)} {
		ctx, cancel := context.WithCancel(t.Context())
		r := io.MultiReader(bytes.NewReader(blob[:100_000]), readerFunc(func([]byte) (int, error) {
			cancel()
			return 0, nil
		}))
		if _, err := layer.Build(ctx, r, describe(blob), io.Discard, layer.Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestMediaTypes(t *testing.T) {
	for mediaType, ok := range map[string]bool{
		"":                                       true,
		"application/vnd.oci.image.layer.v1.tar": true,
		"application/vnd.oci.image.layer.v1.tar+gzip":                      true,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip":     true,
		"application/vnd.docker.image.rootfs.diff.tar.gzip":                true,
		"application/vnd.docker.image.rootfs.diff.tar":                     true,
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":        true,
		"application/vnd.oci.image.layer.v1.tar+zstd":                      true,
		"application/vnd.docker.image.rootfs.diff.tar.zstd":                true,
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted":            false,
		"application/vnd.cncf.model.weight.v1.tar":                         false,
		"application/vnd.oci.image.layer.nydus.blob.v1":                    false,
		"application/vnd.docker.container.image.v1+json; charset=anything": false,
	} {
		err := layer.CheckMediaType(mediaType)
		if ok != (err == nil) || err != nil && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), mediaType)) {
			t.Errorf("%q: %v", mediaType, err)
		}
	}
}

func TestBuildEmpty(t *testing.T) {
	for _, blob := range [][]byte{nil, make([]byte, 1024), compress(nil, 1)} {
		l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), io.Discard, layer.Options{})
		if err != nil || len(l.Entries) != 0 || l.Table.Size != 0 {
			t.Errorf("%d bytes: %+v, %v", len(blob), l, err)
		}
	}
}

// TestBuildMemory streams a layer larger than what Build may hold.
func TestBuildMemory(t *testing.T) {
	const size, limit = 64 << 20, 24 << 20
	var head bytes.Buffer
	if err := tar.NewWriter(&head).WriteHeader(&tar.Header{Name: "large", Size: size}); err != nil {
		t.Fatal(err)
	}
	data := content(1 << 20)
	parts := []io.Reader{bytes.NewReader(head.Bytes())}
	for range size / len(data) {
		parts = append(parts, bytes.NewReader(data))
	}
	sum := digest.Canonical.Digester()
	for _, b := range append([][]byte{head.Bytes()}, slices.Repeat([][]byte{data}, size/len(data))...) {
		sum.Hash().Write(b)
	}
	desc := layer.Descriptor{Digest: sum.Digest(), Size: int64(head.Len()) + size}
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	peak := uint64(0)
	_, err := layer.Build(t.Context(), io.MultiReader(parts...), desc, io.Discard, layer.Options{Progress: func(n int64) {
		if n%(16<<20) < 1<<16 {
			var now runtime.MemStats
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapAlloc)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if peak == 0 || peak > before.HeapAlloc+limit {
		t.Errorf("heap grew by %d bytes", int64(peak)-int64(before.HeapAlloc))
	}
}

func BenchmarkBuild(b *testing.B) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	all := content(4 << 20)
	for i := range 16 {
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Size: int64(len(all))}); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(all); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	for name, blob := range map[string][]byte{"tar": plain.Bytes(), "gzip": compress(plain.Bytes(), 1), "zstd": zstdFrames(plain.Bytes(), plain.Len())} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(plain.Len()))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := layer.Build(b.Context(), bytes.NewReader(blob), describe(blob), io.Discard, layer.Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
