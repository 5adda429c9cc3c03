package layer_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/pierrec/lz4/v4"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
)

// packer makes a layer of pieces: it is told how the next bytes of the segment
// are stored.
type packer struct {
	layer index.Layer
	blobs [][]byte // the layer's own first
	seg   []byte
}

func lz4Compress(t testing.TB, b []byte) []byte {
	t.Helper()
	out := make([]byte, lz4.CompressBlockBound(len(b)))
	n, err := lz4.CompressBlock(b, out, nil)
	if err != nil || n == 0 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	return out[:n]
}

// unit adds a unit with plain in it, and chunks of the given sizes that follow
// each other in it from offset inner on.
func (p *packer) unit(t testing.TB, codec index.Codec, blob int, plain []byte, inner int, sizes ...int) {
	t.Helper()
	packed := plain
	switch codec {
	case index.GzipMember:
		packed = compress(plain, 1)
	case index.ZstdFrame:
		packed = zstdFrames(plain, 1+len(plain)/2)
	case index.LZ4Block:
		packed = lz4Compress(t, plain)
	}
	x := index.Piece{Off: int64(len(p.blobs[blob])), Len: int64(len(packed)), Inner: int64(inner), Blob: uint16(blob), Codec: codec}
	p.blobs[blob] = append(p.blobs[blob], packed...)
	p.chunks(x, plain, sizes...)
}

// deflate adds chunks of a gzip blob from its checkpoint number i on.
func (p *packer) deflate(t testing.TB, plain []byte, sizes ...int) {
	t.Helper()
	gz := compress(plain, 1)
	z := new(gzip.Pool).NewReader(bytes.NewReader(gz))
	z.Record(50_000)
	if _, err := io.Copy(io.Discard, z); err != nil {
		t.Fatal(err)
	}
	base := int64(len(p.blobs[0]))
	p.blobs[0] = append(p.blobs[0], gz...)
	for i, c := range z.Checkpoints() {
		off := base + c.Bit/8
		x := index.Piece{Off: off, Len: base + int64(len(gz)) - off, Inner: 1000, Codec: index.Deflate, Point: uint32(i)}
		at := c.Out
		c.Bit += base * 8
		p.layer.Access.Checkpoints = append(p.layer.Access.Checkpoints, c)
		if at+20_000 < int64(len(plain)) {
			p.chunks(x, plain[at:], sizes...)
		}
	}
}

func (p *packer) chunks(x index.Piece, plain []byte, sizes ...int) {
	for _, n := range sizes {
		b := plain[x.Inner:][:n]
		p.layer.Table.Chunks = append(p.layer.Table.Chunks, index.Chunk{Off: int64(len(p.seg)), Len: int64(n), Sum: sha256.Sum256(b)})
		p.layer.Access.Pieces = append(p.layer.Access.Pieces, x)
		p.seg = append(p.seg, b...)
		x.Inner += int64(n)
	}
	p.seg = append(p.seg, make([]byte, index.RoundUp(int64(len(p.seg)))-int64(len(p.seg)))...)
}

// finish returns the layer.
func (p *packer) finish(t testing.TB) *index.Layer {
	t.Helper()
	l := &p.layer
	l.Access.Format, l.Table.Size = index.Chunked, int64(len(p.seg))
	l.Blob, l.BlobSize = digest.FromBytes(p.blobs[0]), int64(len(p.blobs[0]))
	for _, b := range p.blobs[1:] {
		l.Access.Blobs = append(l.Access.Blobs, index.BlobRef{Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	if err := l.Validate(); err != nil {
		t.Fatal(err)
	}
	return l
}

// blobs are those of a packer as a Reader wants them.
func (p *packer) open() (layer.Blobs, []*memoryBlob) {
	byDigest := map[digest.Digest]*memoryBlob{}
	var list []*memoryBlob
	for _, b := range p.blobs {
		m := &memoryBlob{data: b}
		byDigest[digest.FromBytes(b)] = m
		list = append(list, m)
	}
	return func(ref index.BlobRef) layer.Blob { return byDigest[ref.Digest] }, list
}

// manyPieces is a layer with units of every codec in three blobs.
func manyPieces(t testing.TB) *packer {
	p := &packer{blobs: make([][]byte, 3)}
	all := content(1 << 20)
	for i, codec := range []index.Codec{index.Stored, index.GzipMember, index.ZstdFrame, index.LZ4Block} {
		p.unit(t, codec, 0, all[:100_000], 0, 100_000)
		p.unit(t, codec, 0, all[100_000:130_000], 10, 4096, 1, 20_000)
		p.unit(t, codec, i%3, all[200_000:500_000], 100_000, 200_000)
		p.unit(t, codec, 2, all[3:5000], 0, 4000, 500)
	}
	p.deflate(t, all, 10_000, 5_000)
	return p
}

func TestPieces(t *testing.T) {
	p := manyPieces(t)
	l := p.finish(t)
	blobs, list := p.open()
	r := layer.NewReader(l, blobs)
	checkRange := func(off, n int64) {
		t.Helper()
		s, err := r.Open(t.Context(), off, n)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, p.seg[off:off+n]) {
			t.Fatalf("range %d+%d is not that of the segment; %v", off, n, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	checkRange(0, l.Table.Size)
	for _, c := range l.Table.Chunks {
		checkRange(c.Off, c.Len)
		checkRange(c.Off+c.Len/3, c.Len-c.Len/3)
	}
	rnd := newRand()
	for range 200 {
		n := rnd.Int64N(300_000)
		checkRange(rnd.Int64N(l.Table.Size-n), n)
	}
	for i, b := range list {
		if b.open != 0 || b.requests == 0 {
			t.Errorf("blob %d: %d requests, %d not closed", i, b.requests, b.open)
		}
	}
}

// TestPiecesShareRequests holds that neighbours are read with one request, and
// that a unit is not decompressed for each of its pieces.
func TestPiecesShareRequests(t *testing.T) {
	all := content(1 << 20)
	for _, codec := range []index.Codec{index.Stored, index.GzipMember, index.ZstdFrame, index.LZ4Block} {
		p := &packer{blobs: make([][]byte, 2)}
		for i := range 50 {
			p.unit(t, codec, 1, all[i*10_000:(i+1)*10_000], 0, 4096, 4096, 1000)
		}
		l := p.finish(t)
		blobs, list := p.open()
		s, err := layer.NewReader(l, blobs).Open(t.Context(), 0, l.Table.Size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, s); err != nil {
			t.Fatal(err)
		}
		if b := list[1]; b.requests != 1 || b.asked > int64(len(b.data)) {
			t.Errorf("codec %d: %d requests for %d of %d bytes", codec, b.requests, b.asked, len(b.data))
		}
	}
}

// TestStoredAsksForItsBytes holds that of plain bytes no more is asked for than
// will be read.
func TestStoredAsksForItsBytes(t *testing.T) {
	p := &packer{blobs: make([][]byte, 1)}
	p.unit(t, index.Stored, 0, content(1<<20), 100, 1<<20-100)
	blobs, list := p.open()
	s, err := layer.NewReader(p.finish(t), blobs).Open(t.Context(), 5000, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, s); err != nil || list[0].asked != 4096 {
		t.Errorf("%d bytes asked for, %v", list[0].asked, err)
	}
}

func TestPieceErrors(t *testing.T) {
	all := content(300_000)
	for _, codec := range []index.Codec{index.Stored, index.GzipMember, index.ZstdFrame, index.LZ4Block} {
		p := &packer{blobs: make([][]byte, 2)}
		p.unit(t, codec, 1, all[:1000], 0, 1000)
		l := p.finish(t)
		blobs, _ := p.open()
		l.Table.Chunks[0].Len = 2000 // more than the unit has
		_, err := readAll(t, l, blobs)
		if !errors.Is(err, io.ErrUnexpectedEOF) && !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), l.Blob.String()) {
			t.Errorf("codec %d, unit that is too short: %v", codec, err)
		}
		if codec == index.Stored {
			continue
		}
		garbage := bytes.Repeat([]byte{0xf1, 0x2e}, 1000)
		_, err = readAll(t, l, layer.OneBlob(&memoryBlob{data: garbage}))
		if !errdefs.IsDataLoss(err) {
			t.Errorf("codec %d, garbage: %v", codec, err)
		}
	}
}

func readAll(t testing.TB, l *index.Layer, blobs layer.Blobs) ([]byte, error) {
	t.Helper()
	s, err := layer.NewReader(l, blobs).Open(t.Context(), 0, l.Table.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	return io.ReadAll(s)
}

// TestPieceFarInside holds that a read ends with its context however much there
// is to decompress before the bytes it wants.
func TestPieceFarInside(t *testing.T) {
	p := &packer{blobs: make([][]byte, 1)}
	p.unit(t, index.ZstdFrame, 0, make([]byte, 64<<20), 0, 1000)
	l := p.finish(t)
	l.Access.Pieces[0].Inner = 60 << 20
	blobs, _ := p.open()
	ctx, cancel := context.WithCancelCause(t.Context())
	s, err := layer.NewReader(l, blobs).Open(ctx, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("reader is gone")
	cancel(gone)
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestLZ4Bound holds that a block gets no more memory than a chunk may take.
func TestLZ4Bound(t *testing.T) {
	for _, inner := range []int{index.MaxChunk - 999, index.MaxChunk - 1000} {
		p := &packer{blobs: make([][]byte, 1)}
		p.unit(t, index.LZ4Block, 0, make([]byte, index.MaxChunk+1), inner, 1000)
		blobs, _ := p.open()
		_, err := readAll(t, p.finish(t), blobs)
		if !errdefs.IsDataLoss(err) {
			t.Errorf("inner offset %d of a block above the bound: %v", inner, err)
		}
	}
}

// spanLayer is a layer whose blob has digests of spans, each of which shares a
// byte with the next.
func spanLayer(t *testing.T, size int64) (*index.Layer, []byte, []byte) {
	t.Helper()
	blob := sampleGzip()
	var seg bytes.Buffer
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), &seg, layer.Options{Span: 100_000})
	if err != nil {
		t.Fatal(err)
	}
	l.Table.Algorithm = index.Vouched
	for off := int64(0); off < l.BlobSize-1; off += size {
		n := min(size+1, l.BlobSize-off)
		l.Access.Spans = append(l.Access.Spans, index.Span{Off: off, Len: n, Sum: sha256.Sum256(blob[off : off+n])})
	}
	if err := l.Validate(); err != nil {
		t.Fatal(err)
	}
	return l, blob, seg.Bytes()
}

func TestSpans(t *testing.T) {
	for _, size := range []int64{1000, 77_777, 10 << 20} {
		l, blob, seg := spanLayer(t, size)
		checkReader(t, l, blob, seg)
	}
}

func TestSpanErrors(t *testing.T) {
	l, blob, seg := spanLayer(t, 50_000)
	wrong := bytes.Clone(blob)
	wrong[120_000] ^= 1
	got, err := readAll(t, l, layer.OneBlob(&memoryBlob{data: wrong}))
	says := fmt.Sprintf("span 2 of blob %s", l.Blob)
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), says) {
		t.Errorf("one wrong bit: %v, want %q", err, says)
	}
	if len(got) == 0 || !bytes.HasPrefix(seg, got) {
		t.Errorf("%d bytes before it, which are not those of the segment", len(got))
	}
	all := l.Access.Spans
	for name, spans := range map[string][]index.Span{"start": all[1:], "middle": slices.Concat(all[:2], all[3:]), "end": all[:len(all)-1]} {
		l.Access.Spans = spans
		if err := l.Validate(); err != nil {
			t.Fatal(err)
		}
		_, err := readAll(t, l, layer.OneBlob(&memoryBlob{data: blob}))
		if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "no digest for byte") || !strings.Contains(err.Error(), l.Blob.String()) {
			t.Errorf("without a span at the %s: %v", name, err)
		}
	}
	l.Access.Spans = all
	if _, err := readAll(t, l, layer.OneBlob(&memoryBlob{data: blob[:60_000]})); err == nil {
		t.Error("a blob that was cut is read")
	}
}
