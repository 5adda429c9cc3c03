package layer

import (
	"bytes"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/pierrec/lz4/v4"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// unpack opens the compressed bytes of a piece, of whose plain bytes n behind
// its inner offset will be read.
func (r *Reader) unpack(packed io.Reader, x index.Piece, n int64) (plain, error) {
	switch x.Codec {
	case index.Stored:
		return stored{packed}, nil
	case index.GzipMember:
		return gzipPool.NewReader(packed), nil
	case index.ZstdFrame:
		return zstdPool.Resume(packed, index.Checkpoint{Bit: x.Off * 8}), nil
	case index.Deflate:
		return gzipPool.Resume(packed, r.layer.Access.Checkpoints[x.Point]), nil
	case index.LZ4Block:
		b, err := lz4Block(packed, x, n)
		if err != nil {
			return nil, fmt.Errorf("LZ4 block at byte %d of %s: %w", x.Off, r.name(x.Blob), err)
		}
		return stored{bytes.NewReader(b)}, nil
	}
	return nil, r.invalid(fmt.Sprintf("unknown codec %d", x.Codec))
}

// name names the blob that a piece is in.
func (r *Reader) name(blob uint16) string {
	if blob == 0 {
		return "the blob"
	}
	return "blob " + string(r.layer.Access.Blobs[blob-1].Digest)
}

// stored is plain bytes that need no decoder.
type stored struct{ io.Reader }

func (s stored) Discard(n int64) error {
	_, err := io.CopyN(io.Discard, s.Reader, n)
	return err
}

func (s stored) Close() error { return nil }

// lz4Block decompresses the block of a piece, of which n bytes behind its inner
// offset are needed. The block does not tell its plain size, which is at least
// that; the largest chunk bounds it.
func lz4Block(packed io.Reader, x index.Piece, n int64) ([]byte, error) {
	size := x.Inner + n
	if size > index.MaxChunk || x.Len > int64(lz4.CompressBlockBound(index.MaxChunk)) {
		return nil, fmt.Errorf("%d bytes to reach %d plain ones are over what a chunk has: %w", x.Len, size, errdefs.ErrDataLoss)
	}
	var src bytes.Buffer
	k, err := src.ReadFrom(packed)
	if err == nil && k < x.Len {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	for ; ; size = min(2*size, index.MaxChunk) {
		plain := make([]byte, size)
		k, err := lz4.UncompressBlock(src.Bytes(), plain)
		if err == nil {
			return plain[:k], nil
		}
		if size == index.MaxChunk {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
		}
	}
}
