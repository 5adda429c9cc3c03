package layer_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// Bounds of fuzzed layers: what they leave out is long and not interesting.
const (
	fuzzSegment = 1 << 20
	fuzzItems   = 16
	fuzzInner   = 4 << 20
)

// numbers is a list of numbers in bytes, for a layer to be made of.
type numbers []byte

// next is the next one, below n; 0 when there are no more.
func (v *numbers) next(n int64) int64 {
	x, k := binary.Uvarint(*v)
	if k <= 0 {
		*v = nil
		return 0
	}
	*v = (*v)[k:]
	return int64(x % uint64(n))
}

// hostile makes a layer over a blob out of numbers: as many chunks, extents,
// checkpoints and spans as they say, with offsets that may be anything.
func hostile(blob []byte, v numbers) *index.Layer {
	size := int64(len(blob))
	l := &index.Layer{Blob: digest.FromBytes(blob), BlobSize: size}
	l.Access.Format = index.Format(1 + v.next(4))
	end := int64(0)
	for range v.next(fuzzItems) {
		c := index.Chunk{Off: end + v.next(3000), Len: 1 + v.next(100_000)}
		end = c.End()
		l.Table.Chunks = append(l.Table.Chunks, c)
		l.Access.Pieces = append(l.Access.Pieces, index.Piece{Off: v.next(size + 1), Len: v.next(size + 1), Inner: v.next(fuzzInner),
			Blob: uint16(v.next(2)), Codec: index.Codec(v.next(5)), Point: uint32(v.next(fuzzItems))})
	}
	for range v.next(fuzzItems) {
		l.Access.Checkpoints = append(l.Access.Checkpoints, index.Checkpoint{Bit: v.next(8 * (size + 1)), Out: v.next(fuzzInner),
			Window: make([]byte, v.next(index.MaxWindow+1))})
	}
	for range v.next(fuzzItems) {
		x := index.Extent{Seg: end + v.next(3000), Tar: v.next(fuzzInner), Len: 1 + v.next(100_000)}
		end = x.Seg + x.Len
		l.Access.Extents = append(l.Access.Extents, x)
	}
	hostileSpans(l, blob, &v)
	l.Table.Size = index.RoundUp(end)
	if l.Access.Format == index.Chunked {
		l.Access.Blobs = []index.BlobRef{{Digest: l.Blob, Size: size}}
	} else {
		l.Access.Pieces = nil
	}
	return l
}

func hostileSpans(l *index.Layer, blob []byte, v *numbers) {
	for range v.next(fuzzItems) {
		s := index.Span{Off: v.next(l.BlobSize + 1), Len: v.next(l.BlobSize + 1)}
		if s.End() <= l.BlobSize {
			s.Sum = sha256.Sum256(blob[s.Off:s.End()])
		}
		l.Access.Spans = append(l.Access.Spans, s)
		l.Table.Algorithm = index.Vouched
	}
}

// encode writes numbers as hostile reads them.
func encode(list ...int64) []byte {
	var b []byte
	for _, x := range list {
		b = binary.AppendUvarint(b, uint64(x))
	}
	return b
}

// pieceSeed is the numbers of a layer with two pieces of one unit that is a
// blob from byte off on: its plain bytes 0 to 5000, and 6000 to 9000.
func pieceSeed(codec index.Codec, off, size int64) []byte {
	return encode(3, 2,
		0, 4999, off, size-off, 0, 0, int64(codec), 0,
		100, 2999, off, size-off, 6000, 1, int64(codec), 0,
		1, off*8, 0, 0)
}

// streamSeed is the numbers of a layer with two extents of a stream, its plain
// bytes 0 to 5000, and 6000 to 9000. It has a checkpoint before them, but for
// the format Tar, and spans of which offset and length are given.
func streamSeed(format index.Format, bit int64, spans ...int64) []byte {
	list := []int64{int64(format) - 1, 0, 1, bit, 0, 0}
	if format == index.Tar {
		list = []int64{0, 0, 0}
	}
	list = append(list, 2, 0, 0, 4999, 100, 6000, 2999, int64(len(spans)/2))
	return encode(append(list, spans...)...)
}

// seed is a blob and the numbers of a layer over it that can be read.
type seed struct {
	blob    []byte
	numbers []byte
}

// seeds of plain bytes in every codec and format.
func seeds(t testing.TB, plain []byte) []seed {
	gz, zst, block := compress(plain, 1), zstdFrames(plain, 4000), lz4Compress(t, plain)
	size := int64(len(gz))
	return []seed{
		{plain, pieceSeed(index.Stored, 0, int64(len(plain)))},
		{gz, pieceSeed(index.GzipMember, 0, size)},
		{zst, pieceSeed(index.ZstdFrame, 0, int64(len(zst)))},
		{block, pieceSeed(index.LZ4Block, 0, int64(len(block)))},
		{gz, pieceSeed(index.Deflate, 10, size)}, // behind the member's header
		{plain, streamSeed(index.Tar, 0)},
		{gz, streamSeed(index.Gzip, 80)},
		{gz, streamSeed(index.Gzip, 80, 0, 1000, 999, size-999)},
		{zst, streamSeed(index.Zstd, 0)},
	}
}

// TestSeeds holds that what fuzzing begins with is read to its end.
func TestSeeds(t *testing.T) {
	plain := content(10_000)
	for i, s := range seeds(t, plain) {
		l := hostile(s.blob, s.numbers)
		if err := l.Validate(); err != nil {
			t.Fatal(i, err)
		}
		got, err := readAll(t, l, layer.OneBlob(&memoryBlob{data: s.blob}))
		want := slices.Concat(plain[:5000], make([]byte, 100), plain[6000:9000], make([]byte, 92))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("seed %d: %d bytes, %v", i, len(got), err)
		}
	}
}

// FuzzReader reads layers whose index is valid and means nothing, or blobs that
// are not what it says: a stream is as long as it should be or has an error of
// a class, and nothing is left open.
func FuzzReader(f *testing.F) {
	for _, s := range seeds(f, content(10_000)) {
		f.Add(s.blob, s.numbers)
	}
	f.Fuzz(func(t *testing.T, blob []byte, v []byte) {
		l := hostile(blob, v)
		if l.Validate() != nil || l.Table.Size > fuzzSegment {
			return
		}
		b := &memoryBlob{data: blob}
		r := layer.NewReader(l, layer.OneBlob(b))
		for _, x := range []index.Range{{Off: 0, Len: l.Table.Size}, {Off: l.Table.Size / 3, Len: l.Table.Size / 2}} {
			checkHostile(t, r, x)
		}
		if b.open != 0 {
			t.Fatalf("%d requests were not closed", b.open)
		}
	})
}

func checkHostile(t *testing.T, r *layer.Reader, x index.Range) {
	t.Helper()
	s, err := r.Open(t.Context(), x.Off, x.Len)
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	_, err = got.ReadFrom(s)
	if err == nil && int64(got.Len()) != x.Len || int64(got.Len()) > x.Len {
		t.Fatalf("%d bytes of %d", got.Len(), x.Len)
	}
	if err != nil && !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("error without a class: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
