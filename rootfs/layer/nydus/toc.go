package nydus

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/layer"
)

// Limits of what is read of a blob besides chunks, in bytes.
const (
	maxMeta      = 256 << 20 // of chunk information, compressed or not
	maxMetaRatio = 1024      // between the two
	maxTOC       = 64 << 10
)

// loadMeta reads the chunk information of b out of r and checks it against
// the digests that the bootstrap vouches for, if there are any.
func loadMeta(ctx context.Context, b *blob, r layer.Blob) (*meta, error) {
	i := &b.info
	if i.packed > maxMeta || i.plain > maxMeta || i.plain > maxMetaRatio*(i.packed+1) {
		return nil, invalid("chunk information of %d bytes, compressed to %d", i.plain, i.packed)
	}
	if size := uint64(r.Size()); i.off > size || i.packed+headerSize > size-i.off {
		return nil, invalid("chunk information at %d, %d bytes, is not within a blob of %d", i.off, i.packed+headerSize, size)
	}
	raw, err := layer.ReadRange(ctx, r, int64(i.off), int64(i.packed+headerSize))
	if err != nil {
		return nil, err
	}
	header := raw[i.packed:]
	plain, err := decompress(i.compressor, raw[:i.packed], int64(i.plain))
	if err != nil {
		return nil, fmt.Errorf("chunk information: %w", err)
	}
	if err := verifyMeta(ctx, b, r, plain, header); err != nil {
		return nil, err
	}
	return parseMeta(b, plain, header)
}

// verifyMeta checks chunk information against the blob's table of contents.
func verifyMeta(ctx context.Context, b *blob, r layer.Blob, plain, header []byte) error {
	if b.toc.size == 0 || b.toc.digest == [32]byte{} {
		return nil
	}
	if b.toc.size > maxTOC || b.toc.size > uint64(r.Size()) {
		return invalid("table of contents of %d bytes in a blob of %d", b.toc.size, r.Size())
	}
	raw, err := layer.ReadRange(ctx, r, r.Size()-int64(b.toc.size), int64(b.toc.size))
	if err != nil {
		return err
	}
	if sha256.Sum256(raw) != b.toc.digest {
		return fmt.Errorf("table of contents does not have the digest that the bootstrap says: %w", errdefs.ErrDataLoss)
	}
	for name, data := range map[string][]byte{"blob.meta": plain, "blob.meta.header": header} {
		sum, ok := findTOC(raw, name)
		if !ok {
			return invalid("table of contents does not list %s", name)
		}
		if sha256.Sum256(data) != sum {
			return fmt.Errorf("%s does not have the digest that the table of contents says: %w", name, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// findTOC looks for the plain digest of a part of a blob in its table of
// contents (nydus, storage/src/meta/toc.rs): entries of 128 bytes, the header
// of a tar file behind them.
func findTOC(toc []byte, name string) (sum [32]byte, ok bool) {
	const entry, tarHeader = 128, 512
	for ; len(toc) >= entry+tarHeader; toc = toc[entry:] {
		if string(bytes.TrimRight(toc[8:24], "\x00")) == name {
			return [32]byte(toc[24:56]), true
		}
	}
	return sum, false
}
