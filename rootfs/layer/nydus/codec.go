package nydus

import (
	"bytes"
	stdgzip "compress/gzip"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Compressors (nydus, utils/src/compress/mod.rs).
const (
	compressNone = iota
	compressLZ4
	compressGzip
	compressZstd
)

// codecOf is what a compressor makes of a chunk.
func codecOf(compressor uint32) (index.Codec, error) {
	switch compressor {
	case compressNone:
		return index.Stored, nil
	case compressLZ4:
		return index.LZ4Block, nil
	case compressGzip:
		return index.GzipMember, nil
	case compressZstd:
		return index.ZstdFrame, nil
	}
	return 0, invalid("unknown compressor %d", compressor)
}

// decompress unpacks metadata, which must be of exactly size bytes.
func decompress(compressor uint32, b []byte, size int64) ([]byte, error) {
	out, err := unpack(compressor, b, size)
	if err != nil {
		return nil, fmt.Errorf("decompress: %w: %w", err, errdefs.ErrDataLoss)
	}
	if int64(len(out)) != size {
		return nil, fmt.Errorf("decompressed to %d bytes instead of %d: %w", len(out), size, errdefs.ErrDataLoss)
	}
	return out, nil
}

// unpack decompresses b to size bytes; it may give one more than that where
// there are more.
func unpack(compressor uint32, b []byte, size int64) ([]byte, error) {
	switch compressor {
	case compressNone:
		return b, nil
	case compressLZ4:
		out := make([]byte, size)
		n, err := lz4.UncompressBlock(b, out)
		return out[:max(n, 0)], err
	case compressGzip:
		r, err := stdgzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(r, size+1))
	case compressZstd:
		r, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(io.LimitReader(r, size+1))
	}
	return nil, invalid("unknown compressor %d", compressor)
}

// maxZstdWindow is far above what nydus-image's levels use, in bytes.
const maxZstdWindow = 128 << 20
