package nydus

import (
	"encoding/hex"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Features of a blob (nydus, storage/src/device.rs, BlobFeatures). Those not
// named here only say how a blob was made.
const (
	featureChunkInfoV2 = 0x4
	featureZran        = 0x8
	featureSeparate    = 0x10
	featureTarfs       = 0x40
	featureBatch       = 0x80
	featureEncrypted   = 0x100
	featureExternal    = 0x800
	featuresKnown      = 0xf000_0fff
)

// blob is one blob of the bootstrap's blob table.
type blob struct {
	id         string // of a pushed image: the hexadecimal SHA-256 of the whole blob
	features   uint32
	compressor uint32
	cipher     uint32
	size       uint64 // compressed bytes, as the bootstrap knows them
	toc        tocPlace
	info       infoPlace
	metaDigest [32]byte // of the blob with the metadata, if that is another one

	meta   *meta  // how its chunks are packed, if the bootstrap does not say
	number uint16 // in Access.Blobs from 1 on; 0 while no chunk is used
}

// infoPlace is where a blob keeps the table of how its chunks are packed.
type infoPlace struct {
	compressor uint32
	chunks     uint32 // how many
	off        uint64 // in the blob, bytes
	packed     uint64 // compressed bytes
	plain      uint64 // decompressed bytes
}

// tocPlace is the table of contents at the end of a blob; size 0 if the
// bootstrap does not vouch for one.
type tocPlace struct {
	size   uint64 // bytes, with the tar header behind it
	digest [32]byte
}

// packed tells whether chunks of the blob share compressed data, so that the
// bootstrap alone does not say where they are.
func (b *blob) packed() bool { return b.features&(featureBatch|featureZran) != 0 }

// check refuses blobs that cannot be read.
func (b *blob) check() error {
	switch {
	case b.cipher != 0 || b.features&featureEncrypted != 0:
		return errEncrypted(b.id)
	case b.features&^featuresKnown != 0:
		return invalid("blob %s has unknown features %#x; it needs a newer version of this program", b.id, b.features&^featuresKnown)
	case b.features&featureTarfs != 0:
		return errTarfs()
	case b.features&featureExternal != 0:
		return invalid("blob %s lies in a storage outside the registry, which is not supported; convert the image without external data", b.id)
	case b.packed() && b.features&featureChunkInfoV2 == 0:
		return invalid("blob %s has batches or gzip contexts without chunk information of version 2", b.id)
	}
	_, err := codecOf(b.compressor)
	return err
}

func errTarfs() error {
	return invalid("the bootstrap is for tarfs mode, which has no digests of chunks; convert the image with nydusify in another mode")
}

// digest is how a manifest names the blob with the data.
func (b *blob) digest() (digest.Digest, error) { return sha256Digest(b.id) }

// metaBlob is how a manifest names the blob with the chunk information.
func (b *blob) metaBlob() (digest.Digest, error) {
	if b.features&featureSeparate != 0 {
		return sha256Digest(hex.EncodeToString(b.metaDigest[:]))
	}
	return b.digest()
}

func sha256Digest(id string) (digest.Digest, error) {
	d := digest.NewDigestFromEncoded(digest.SHA256, id)
	if err := d.Validate(); err != nil {
		return "", invalid("blob id %.80q is not a SHA-256 digest", id)
	}
	return d, nil
}

// Flags of a chunk (nydus, storage/src/device.rs, BlobChunkFlags). Batches and
// checksums are known from elsewhere.
const (
	chunkCompressed = 0x1
	chunkHole       = 0x2
	chunkEncrypted  = 0x4
	chunkFlagsKnown = 0x1f
)

// recordSize is the size of a chunk's record in bytes.
const recordSize = 80

// record is what a bootstrap says of a chunk: RafsV5ChunkInfo of
// rafs/src/metadata/layout/v5.rs, which v6 uses as well.
type record struct {
	sum     index.Sum
	blob    uint32 // number in the blob table, from 0
	flags   uint32
	packed  uint32 // compressed bytes
	plain   uint32 // bytes
	off     uint64 // in the blob
	fileOff uint64 // v5 only: in the file
	number  uint32 // in the blob's chunk information
}

func parseRecord(b []byte) record {
	r := record{
		blob:    le.Uint32(b[32:]),
		flags:   le.Uint32(b[36:]),
		packed:  le.Uint32(b[40:]),
		plain:   le.Uint32(b[44:]),
		off:     le.Uint64(b[48:]),
		fileOff: le.Uint64(b[64:]),
		number:  le.Uint32(b[72:]),
	}
	copy(r.sum[:], b)
	return r
}

// piece finds the data of a chunk of the blob.
func (b *blob) piece(r *record) (index.Piece, error) {
	codec, err := codecOf(b.compressor)
	switch {
	case err != nil:
		return index.Piece{}, err
	case r.flags&^chunkFlagsKnown != 0:
		return index.Piece{}, invalid("chunk %d of blob %s has unknown flags %#x", r.number, b.id, r.flags)
	case r.flags&chunkEncrypted != 0:
		return index.Piece{}, errEncrypted(b.id)
	case b.meta != nil:
		p, err := b.meta.piece(r.number, uint64(r.plain), codec)
		if err != nil {
			return p, fmt.Errorf("chunk %d of blob %s: %w", r.number, b.id, err)
		}
		return p, nil
	case r.flags&chunkCompressed == 0:
		codec = index.Stored
	}
	return b.whole(r, codec)
}

// whole is the piece of a chunk that has compressed data of its own.
func (b *blob) whole(r *record, codec index.Codec) (index.Piece, error) {
	if codec == index.Stored && r.packed != r.plain {
		return index.Piece{}, invalid("chunk %d of blob %s takes %d bytes uncompressed, and has %d", r.number, b.id, r.packed, r.plain)
	}
	return index.Piece{Off: int64(r.off), Len: int64(r.packed), Codec: codec}, nil
}
