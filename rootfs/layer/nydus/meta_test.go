package nydus

import (
	"bytes"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// makeMeta writes chunk information: entries, then contexts, then windows.
func makeMeta(features uint32, entries [][3]uint64, contexts [][]byte, windows []byte) (b *blob, plain, header []byte) {
	for _, e := range entries {
		for _, v := range e {
			plain = le.AppendUint64(plain, v)
		}
	}
	chunks := len(plain)
	for _, c := range contexts {
		plain = append(plain, c...)
	}
	plain = append(plain, windows...)
	b = &blob{features: features | featureChunkInfoV2, info: infoPlace{compressZstd, uint32(len(entries)), 1000, 77, uint64(len(plain))}}
	header = make([]byte, headerSize)
	le.PutUint32(header, headerMagic)
	le.PutUint32(header[headerSize-4:], headerMagic)
	le.PutUint32(header[4:], b.features)
	le.PutUint32(header[8:], b.info.compressor)
	le.PutUint32(header[12:], b.info.chunks)
	le.PutUint64(header[16:], b.info.off)
	le.PutUint64(header[24:], b.info.packed)
	le.PutUint64(header[32:], b.info.plain)
	le.PutUint64(header[40:], uint64(chunks))
	le.PutUint64(header[48:], uint64(len(plain)-chunks))
	le.PutUint32(header[56:], uint32(len(contexts)))
	return b, plain, header
}

// chunkEntry is an entry of version 2.
func chunkEntry(flags, plain, off, packed, number, inner uint64) [3]uint64 {
	return [3]uint64{flags<<56 | (plain-1)<<32, packed<<40 | off, number<<32 | inner}
}

// batch is the context of a batch.
func batch(packed, plain uint32) []byte {
	return append(le.AppendUint32(le.AppendUint32(nil, packed), plain), make([]byte, contextSize-8)...)
}

// gzipContext is the context of a gzip stream.
func gzipContext(in, out, window uint64, inLen, outLen, windowLen uint32, bits byte) []byte {
	c := le.AppendUint64(le.AppendUint64(le.AppendUint64(nil, in), out), window)
	c = le.AppendUint32(le.AppendUint32(le.AppendUint32(c, inLen), outLen), windowLen)
	return append(c, 0xff, bits, 0, 0)
}

func TestMeta(t *testing.T) {
	batches, gzips := [][]byte{batch(50, 300), batch(200, 200)}, [][]byte{
		gzipContext(10, 0, 0, 90, 900, 0, 0), gzipContext(100, 5000, 0, 40, 1000, 3, 5)}
	cases := []struct {
		name     string
		features uint32
		entry    [3]uint64
		want     index.Piece
		says     string // the error
	}{
		{"by itself", featureBatch, chunkEntry(entryCompressed, 100, 500, 60, 0, 0), index.Piece{Off: 500, Len: 60, Codec: index.ZstdFrame}, ""},
		{"stored", featureBatch, chunkEntry(0, 100, 500, 100, 0, 0), index.Piece{Off: 500, Len: 100}, ""},
		{"in a batch", featureBatch, chunkEntry(entryCompressed|entryBatch, 100, 500, 0, 0, 200), index.Piece{Off: 500, Len: 50, Inner: 200, Codec: index.ZstdFrame}, ""},
		{"in a stored batch", featureBatch, chunkEntry(entryCompressed|entryBatch, 100, 500, 0, 1, 100), index.Piece{Off: 600, Len: 100}, ""},
		{"at the start of gzip", featureZran, chunkEntry(entryCompressed|entryZran, 100, 0, 0, 0, 7), index.Piece{Off: 10, Len: 90, Inner: 7, Codec: index.Deflate, Point: 3}, ""},
		{"inside of gzip", featureZran, chunkEntry(entryCompressed|entryZran, 100, 0, 0, 1, 900), index.Piece{Off: 99, Len: 41, Inner: 900, Codec: index.Deflate, Point: 4}, ""},
		{"stored shorter", featureBatch, chunkEntry(0, 100, 500, 99, 0, 0), index.Piece{}, "stored as 99"},
		{"other length", featureBatch, chunkEntry(0, 101, 500, 101, 0, 0), index.Piece{}, "101 bytes in the chunk information"},
		{"unknown flag", featureBatch, chunkEntry(0x20, 100, 500, 100, 0, 0), index.Piece{}, "unknown flags 0x20"},
		{"encrypted", featureBatch, chunkEntry(entryEncrypted, 100, 500, 100, 0, 0), index.Piece{}, "encrypted"},
		{"no batch", featureBatch, chunkEntry(entryBatch, 100, 500, 0, 2, 0), index.Piece{}, "not within"},
		{"behind its batch", featureBatch, chunkEntry(entryBatch, 100, 500, 0, 0, 201), index.Piece{}, "not in batch 0"},
		{"no context", featureZran, chunkEntry(entryZran, 100, 0, 0, 2, 0), index.Piece{}, "no gzip context 2"},
		{"behind its context", featureZran, chunkEntry(entryZran, 100, 0, 0, 1, 901), index.Piece{}, "behind gzip context 1"},
		{"gzip in a blob of batches", featureBatch, chunkEntry(entryZran, 100, 0, 0, 0, 0), index.Piece{}, "no gzip context 0"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			contexts := batches
			if c.features == featureZran {
				contexts = gzips
			}
			m, err := parseMeta(makeMeta(c.features, [][3]uint64{c.entry}, contexts, []byte("win")))
			if err != nil {
				t.Fatal(err)
			}
			m.first = 3
			p, err := m.piece(0, 100, index.ZstdFrame)
			if c.says != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("error %v, want one that says %q", err, c.says)
				}
			} else if err != nil || p != c.want {
				t.Errorf("%+v, %v; want %+v", p, err, c.want)
			}
			if _, err := m.piece(1, 100, index.ZstdFrame); !errdefs.IsInvalidArgument(err) {
				t.Errorf("a chunk that is not there: %v", err)
			}
		})
	}
}

func TestMetaPoints(t *testing.T) {
	contexts := [][]byte{gzipContext(10, 0, 0, 90, 900, 0, 0), gzipContext(100, 5000, 1, 40, 1000, 3, 5)}
	m, err := parseMeta(makeMeta(featureZran, nil, contexts, []byte("-win-")))
	if err != nil {
		t.Fatal(err)
	}
	if len(m.points) != 2 || m.points[0].Bit != 80 || m.points[1].Bit != 795 || m.points[1].Out != 5000 || string(m.points[1].Window) != "win" {
		t.Errorf("%+v", m.points)
	}
}

func TestMetaErrors(t *testing.T) {
	one := [][3]uint64{chunkEntry(0, 100, 500, 100, 0, 0)}
	cases := []struct {
		name     string
		contexts [][]byte
		change   func(b *blob, header []byte)
		says     string
	}{
		{"magic", nil, func(_ *blob, h []byte) { h[0]++ }, "no valid header"},
		{"second magic", nil, func(_ *blob, h []byte) { h[headerSize-1]++ }, "no valid header"},
		{"other place", nil, func(b *blob, _ []byte) { b.info.off++ }, "other things"},
		{"other kind", nil, func(b *blob, _ []byte) { b.features ^= featureZran | featureBatch }, "other things"},
		{"more chunks", nil, func(b *blob, h []byte) { b.info.chunks = 1 << 30; le.PutUint32(h[12:], 1<<30) }, "records"},
		{"contexts outside", nil, func(_ *blob, h []byte) { le.PutUint64(h[40:], 1<<63) }, "not within"},
		{"many contexts", nil, func(_ *blob, h []byte) { le.PutUint32(h[56:], 1) }, "not within"},
		{"window outside", [][]byte{gzipContext(10, 9, 0, 9, 9, 9, 0)}, nil, "not within"},
		{"windows overlap", [][]byte{gzipContext(10, 9, 0, 9, 9, 2, 0), gzipContext(10, 9, 0, 9, 9, 2, 0)}, nil, "overlap"},
		{"bits before the stream", [][]byte{gzipContext(0, 0, 0, 9, 9, 0, 3)}, nil, "begins at byte 0"},
		{"eight bits", [][]byte{gzipContext(9, 0, 0, 9, 9, 0, 8)}, nil, "8 bits"},
		{"far away", [][]byte{gzipContext(1<<60, 0, 0, 9, 9, 0, 0)}, nil, "begins at byte"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b, plain, header := makeMeta(featureZran, one, c.contexts, []byte("win"))
			header = bytes.Clone(header)
			if c.change != nil {
				c.change(b, header)
			}
			if _, err := parseMeta(b, plain, header); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
}
