package nydus

import (
	"bytes"
	"fmt"
	"math/bits"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// RAFS v6 is an EROFS image with a second superblock (nydus,
// rafs/src/metadata/layout/v6.rs; Linux, fs/erofs/erofs_fs.h). Sizes and
// offsets are bytes.
const (
	v6Magic      = 0xe0f5_e1e2
	v6Super      = 1024 // offset of the superblock
	v6SuperSize  = 128
	v6ExtSize    = 256         // of the second superblock, behind the first
	v6Incompat   = 0xc         // files in chunks, device table
	v6Rafs       = 0x4000_0000 // compatible feature: RAFS
	v6BlockBits  = 12
	v6TarfsBits  = 9
	v6BlobSize   = 256
	v6NullBlock  = 0xffff_ffff // a hole instead of a chunk
	v6IndexSize  = 8           // of a chunk in an inode
	v6ByIndex    = 0x20        // format of a file's chunks: indexes, as always here
	v6ChunkBits  = 0x1f
	minChunkSize = 4096
)

// v6 is a bootstrap of version 6.
type v6 struct {
	file     content
	flags    flags
	meta     uint64 // offset of inode 0
	rootNid  uint64
	chunk    uint64 // size of a file's chunks
	built    int64  // time of files that have none of their own
	builtNs  uint32
	blobList []*blob
	table    content           // records of chunks
	records  map[uint64]uint32 // by chunkKey, number in the table
	listed   []uint64
}

// chunkKey names a chunk by its blob and its number there.
func chunkKey(blob, number uint32) uint64 { return uint64(blob)<<32 | uint64(number) }

func parseV6(c content) (*v6, error) {
	b, err := c.at(v6Super, v6SuperSize+v6ExtSize)
	if err != nil || le.Uint32(b) != v6Magic {
		return nil, invalid("bootstrap is neither RAFS v5 nor v6")
	}
	v := &v6{file: c}
	if err := v.super(b[:v6SuperSize]); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	ext := b[v6SuperSize:]
	v.flags, v.chunk = flags(le.Uint64(ext)), uint64(le.Uint32(ext[20:]))
	if err := v.flags.check(); err != nil {
		return nil, err
	}
	if v.chunk < minChunkSize || v.chunk > index.MaxChunk || bits.OnesCount64(v.chunk) != 1 {
		return nil, invalid("chunks of %d bytes; convert the image with a power of two from %d to %d", v.chunk, minChunkSize, index.MaxChunk)
	}
	if err := v.readBlobs(le.Uint64(ext[8:]), uint64(le.Uint32(ext[16:]))); err != nil {
		return nil, fmt.Errorf("blob table: %w", err)
	}
	if err := v.readChunks(le.Uint64(ext[24:]), le.Uint64(ext[32:])); err != nil {
		return nil, fmt.Errorf("chunk table: %w", err)
	}
	if err := v.readPrefetch(le.Uint64(ext[40:]), uint64(le.Uint32(ext[48:]))); err != nil {
		return nil, fmt.Errorf("prefetch table: %w", err)
	}
	return v, nil
}

// super reads the superblock of EROFS.
func (v *v6) super(b []byte) error {
	switch compat, incompat := le.Uint32(b[8:]), le.Uint32(b[80:]); {
	case b[12] == v6TarfsBits:
		return errTarfs()
	case b[12] != v6BlockBits:
		return invalid("blocks of %d bits", b[12])
	case compat&v6Rafs == 0:
		return invalid("an EROFS image that is not RAFS")
	case incompat != v6Incompat:
		return invalid("incompatible features %#x; it needs a newer version of this program", incompat)
	case b[13] != 0 || le.Uint32(b[44:]) != 0:
		return invalid("extensions or shared attributes, which RAFS does not have")
	}
	v.rootNid, v.meta = uint64(le.Uint16(b[14:])), uint64(le.Uint32(b[40:]))<<v6BlockBits
	v.built, v.builtNs = int64(le.Uint64(b[24:])), le.Uint32(b[32:])
	return nil
}

func (v *v6) readBlobs(off, size uint64) error {
	if size%v6BlobSize != 0 {
		return invalid("%d bytes are no table", size)
	}
	b, err := v.file.at(off, size)
	if err != nil {
		return err
	}
	for ; len(b) > 0; b = b[v6BlobSize:] {
		blob := parseV6Blob(b)
		if err := blob.check(); err != nil {
			return err
		}
		if alg := le.Uint32(b[80:]); alg > 1 || (alg == 1) != (v.algorithm() == index.SHA256) {
			return invalid("blob %s has digests of algorithm %d, unlike the bootstrap", blob.id, alg)
		}
		v.blobList = append(v.blobList, blob)
	}
	return nil
}

// parseV6Blob reads an entry of the blob table.
func parseV6Blob(b []byte) *blob {
	return &blob{
		id:         string(bytes.TrimRight(b[:64], "\x00")),
		compressor: le.Uint32(b[76:]),
		features:   le.Uint32(b[84:]),
		size:       le.Uint64(b[88:]),
		cipher:     le.Uint32(b[216:]),
		toc:        tocPlace{uint64(le.Uint32(b[104:])), [32]byte(b[136:168])},
		info:       infoPlace{le.Uint32(b[108:]), le.Uint32(b[72:]), le.Uint64(b[112:]), le.Uint64(b[120:]), le.Uint64(b[128:])},
		metaDigest: [32]byte(b[168:200]),
	}
}

// readChunks reads the table of all chunks of all files, with their digests.
func (v *v6) readChunks(off, size uint64) error {
	if size%recordSize != 0 {
		return invalid("%d bytes are no table", size)
	}
	b, err := v.file.at(off, size)
	if err != nil {
		return err
	}
	v.table, v.records = b, make(map[uint64]uint32, len(b)/recordSize)
	for i := 0; i*recordSize < len(b); i++ {
		r := parseRecord(b[i*recordSize:])
		v.records[chunkKey(r.blob, r.number)] = uint32(i)
	}
	return nil
}

// readPrefetch reads the numbers of inodes. Old bootstraps of empty trees have
// a size without an offset.
func (v *v6) readPrefetch(off, size uint64) error {
	if off == 0 {
		return nil
	}
	b, err := v.file.at(off, size)
	if err != nil {
		return err
	}
	for ; len(b) >= 4; b = b[4:] {
		v.listed = append(v.listed, uint64(le.Uint32(b)))
	}
	return nil
}

func (v *v6) blobs() []*blob             { return v.blobList }
func (v *v6) algorithm() index.Algorithm { return v.flags.algorithm() }
func (v *v6) root() uint64               { return v.rootNid }
func (v *v6) prefetch() []uint64         { return v.listed }

// chunks implements format. An inode has an index for each chunk of the file
// system's chunk size. Its format can name a larger size, for the kernel, when
// all of the file is in one place; the indexes stay.
func (v *v6) chunks(f *inode, add func(*record) error) error {
	size := uint64(f.entry.Size)
	if size == 0 {
		return nil
	}
	if f.union&^(v6ByIndex|v6ChunkBits) != 0 || f.union&v6ByIndex == 0 || uint64(1)<<(v6BlockBits+f.union&v6ChunkBits) < v.chunk {
		return invalid("format %#x of chunks", f.union)
	}
	list, err := f.raw.table((f.body+v6IndexSize-1)&^(v6IndexSize-1), (size+v.chunk-1)/v.chunk, v6IndexSize)
	if err != nil {
		return fmt.Errorf("chunks: %w", err)
	}
	for off := uint64(0); off < size; off += v.chunk {
		r, err := v.record(list[off/v.chunk*v6IndexSize:])
		if err != nil {
			return err
		}
		r.fileOff = off
		if r.flags&chunkHole != 0 {
			r.plain = uint32(min(v.chunk, size-off))
		}
		if err := add(&r); err != nil {
			return err
		}
	}
	return nil
}

// record finds the chunk of an index: the low half of its number, the number of
// the blob from 1 on, the high quarter of the chunk's number, a block.
func (v *v6) record(b []byte) (record, error) {
	if le.Uint32(b[4:]) == v6NullBlock {
		return record{flags: chunkHole}, nil
	}
	number := uint32(b[3])<<16 | uint32(le.Uint16(b))
	if b[2] == 0 {
		return record{}, invalid("chunk %d in no blob", number)
	}
	blob := uint32(b[2]) - 1
	i, ok := v.records[chunkKey(blob, number)]
	if !ok {
		return record{}, invalid("chunk %d of blob %d is not in the table of chunks, which has its digest", number, blob)
	}
	return parseRecord(v.table[i*recordSize:]), nil
}
