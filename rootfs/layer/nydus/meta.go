package nydus

import (
	"github.com/tatami-containers/tatami/rootfs/index"
)

// Chunk information (nydus, storage/src/meta): a table of one entry for each
// chunk of a blob, in the blob behind the data, compressed as a whole, with a
// header behind it. It is only read where chunks share compressed data
// (batches and gzip contexts), which takes entries of version 2; of all other
// chunks the bootstrap says everything, so that version 1 is never needed.
const (
	headerSize  = 4096 // bytes
	headerMagic = 0xb10b_b10b
	entrySize   = 24 // bytes, of version 2
	contextSize = 40 // bytes, of a batch or a gzip context
)

// Flags of an entry of version 2 (chunk_info_v2.rs).
const (
	entryCompressed = 0x1
	entryZran       = 0x2
	entryBatch      = 0x4
	entryEncrypted  = 0x8
	entryKnown      = 0x1f
)

// maxShared bounds what has to be decompressed for one chunk: the plain bytes
// of a batch or of a gzip context (RAFS_MAX_CHUNK_SIZE).
const maxShared = 16 << 20

// meta is the chunk information of one blob.
type meta struct {
	chunks   content // entries
	contexts content // of batches, or of gzip
	windows  content // of gzip contexts
	points   []index.Checkpoint
	first    uint32 // number of points[0] in the layer
}

// parseMeta reads the chunk information of b: the plain entries with the
// contexts behind them, and the header.
func parseMeta(b *blob, plain, header []byte) (*meta, error) {
	if err := checkHeader(b, plain, header); err != nil {
		return nil, err
	}
	c := content(plain)
	off, size, count := le.Uint64(header[40:]), le.Uint64(header[48:]), uint64(le.Uint32(header[56:]))
	m := new(meta)
	var err error
	if m.chunks, err = c.table(0, uint64(b.info.chunks), entrySize); err != nil {
		return nil, err
	}
	all, err := c.at(off, size)
	if err != nil {
		return nil, err
	}
	if m.contexts, err = content(all).table(0, count, contextSize); err != nil {
		return nil, err
	}
	m.windows = content(all[len(m.contexts):])
	if b.features&featureZran == 0 {
		return m, nil
	}
	return m, m.readPoints()
}

// checkHeader compares the header with what the bootstrap says.
func checkHeader(b *blob, plain, header []byte) error {
	switch {
	case len(header) != headerSize || le.Uint32(header) != headerMagic || le.Uint32(header[headerSize-4:]) != headerMagic:
		return invalid("chunk information has no valid header")
	case le.Uint32(header[4:])&(featureChunkInfoV2|featureBatch|featureZran) != b.features&(featureChunkInfoV2|featureBatch|featureZran),
		le.Uint32(header[8:]) != b.info.compressor,
		le.Uint32(header[12:]) != b.info.chunks,
		le.Uint64(header[16:]) != b.info.off,
		le.Uint64(header[24:]) != b.info.packed,
		le.Uint64(header[32:]) != b.info.plain,
		uint64(len(plain)) != b.info.plain:
		return invalid("header of the chunk information says other things than the bootstrap")
	}
	return nil
}

// readPoints makes checkpoints of gzip contexts (zran.rs): offset in the gzip
// stream, offset in the plain stream, offset of the window, lengths of the
// three, and how many bits of the byte before the first belong to it as well.
// Windows do not overlap, so that as many are kept as were read.
func (m *meta) readPoints() error {
	left := len(m.windows)
	for i := 0; i < len(m.contexts); i += contextSize {
		c := m.contexts[i:]
		in, out, bits := le.Uint64(c), le.Uint64(c[8:]), uint64(c[37])
		window, err := m.windows.at(le.Uint64(c[16:]), uint64(le.Uint32(c[32:])))
		if err != nil {
			return err
		}
		if left -= len(window); left < 0 {
			return invalid("windows of gzip contexts overlap")
		}
		if in == 0 || in > index.MaxSegment || out > index.MaxSegment || bits > 7 {
			return invalid("gzip context %d begins at byte %d with %d bits, plain offset %d", i/contextSize, in, bits, out)
		}
		m.points = append(m.points, index.Checkpoint{Bit: int64(in*8 - bits), Out: int64(out), Window: window})
	}
	return nil
}

// piece finds the data of chunk n, whose plain length and codec are given.
// A chunk that is in a batch has the number of the batch and an offset in it;
// one that is in a gzip stream those of a context.
func (m *meta) piece(n uint32, plain uint64, codec index.Codec) (index.Piece, error) {
	e, err := m.chunks.at(uint64(n)*entrySize, entrySize)
	if err != nil {
		return index.Piece{}, err
	}
	size, packed := le.Uint64(e)>>32&0xff_ffff+1, le.Uint64(e[8:])
	off, length := packed&0xff_ffff_ffff, packed>>40
	number, inner := le.Uint32(e[20:]), uint64(le.Uint32(e[16:]))
	switch flags := e[7]; {
	case flags&^entryKnown != 0:
		return index.Piece{}, invalid("unknown flags %#x", flags)
	case flags&entryEncrypted != 0:
		return index.Piece{}, invalid("it is encrypted, which is not supported; convert the image without encryption")
	case size != plain:
		return index.Piece{}, invalid("%d bytes in the chunk information and %d in the bootstrap", size, plain)
	case flags&entryZran != 0:
		return m.inGzip(number, inner, plain)
	case flags&entryBatch != 0:
		return m.inBatch(off, number, inner, plain, codec)
	case flags&entryCompressed == 0:
		codec = index.Stored
	}
	if codec == index.Stored && length != plain {
		return index.Piece{}, invalid("%d bytes stored as %d", plain, length)
	}
	return index.Piece{Off: int64(off), Len: int64(length), Codec: codec}, nil
}

// inGzip is the piece of a chunk behind a checkpoint.
func (m *meta) inGzip(number uint32, inner, plain uint64) (index.Piece, error) {
	if uint64(number) >= uint64(len(m.points)) {
		return index.Piece{}, invalid("no gzip context %d", number)
	}
	c := m.contexts[number*contextSize:]
	end, size := le.Uint64(c)+uint64(le.Uint32(c[24:])), uint64(le.Uint32(c[28:]))
	if size > maxShared || inner+plain > size {
		return index.Piece{}, invalid("range %d+%d is not in the %d bytes behind gzip context %d", inner, plain, size, number)
	}
	off := m.points[number].Bit / 8
	return index.Piece{Off: off, Len: int64(end) - off, Inner: int64(inner), Codec: index.Deflate, Point: m.first + number}, nil
}

// inBatch is the piece of a chunk in a batch, which lies at off. A batch that
// compressing did not make smaller is stored as it is.
func (m *meta) inBatch(off uint64, number uint32, inner, plain uint64, codec index.Codec) (index.Piece, error) {
	c, err := m.contexts.at(uint64(number)*contextSize, contextSize)
	if err != nil {
		return index.Piece{}, err
	}
	packed, size := uint64(le.Uint32(c)), uint64(le.Uint32(c[4:]))
	if size > maxShared || inner+plain > size {
		return index.Piece{}, invalid("range %d+%d is not in batch %d of %d bytes", inner, plain, number, size)
	}
	if packed == size {
		return index.Piece{Off: int64(off + inner), Len: int64(plain), Codec: index.Stored}, nil
	}
	return index.Piece{Off: int64(off), Len: int64(packed), Inner: int64(inner), Codec: codec}, nil
}
