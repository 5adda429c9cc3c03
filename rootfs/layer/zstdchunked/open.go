package zstdchunked

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/toc"
)

// maxWindow bounds how far back data may refer in a compressed TOC, and so the
// decoder's memory, in bytes. Encoders use up to 8 MiB.
const maxWindow = 32 << 20

// Open makes a layer out of the TOC of a zstd:chunked blob, with one range of
// it, or two if the annotations of desc do not say where the TOC is. They have
// the digest that binds it; the blob's own digest cannot be checked without
// reading all of it.
//
// Errors: ErrInvalidArgument for annotations that are not those of one
// zstd:chunked blob or a TOC that is not valid, ErrDataLoss if the TOC is not
// the one that they name; those of b as they are.
func Open(ctx context.Context, b layer.Blob, desc layer.Descriptor) (*index.Layer, error) {
	l, err := open(ctx, b, desc)
	if err != nil {
		return nil, fmt.Errorf("open zstd:chunked layer %s: %w", desc.Digest, err)
	}
	return l, nil
}

func open(ctx context.Context, b layer.Blob, desc layer.Descriptor) (*index.Layer, error) {
	a, err := findAnchor(desc.Annotations)
	if err != nil {
		return nil, err
	}
	if a.at == (position{}) {
		if a.at, err = findTOC(ctx, b, desc); err != nil {
			return nil, err
		}
	}
	if a.at.off > desc.Size-a.at.len {
		return nil, toc.Invalid(fmt.Errorf("TOC of %d bytes at byte %d of %d", a.at.len, a.at.off, desc.Size))
	}
	packed, err := layer.ReadRange(ctx, b, a.at.off, a.at.len)
	if err != nil {
		return nil, err
	}
	json, err := a.unpack(packed)
	if err != nil {
		return nil, err
	}
	return toc.Parse(json, desc, a.at.off-frameHeader, toc.Format{Codec: index.ZstdFrame, Marked: a.marked})
}

// unpack returns the TOC's JSON once its digest is right.
func (a anchor) unpack(packed []byte) ([]byte, error) {
	if a.packed {
		if err := a.check(packed); err != nil {
			return nil, err
		}
		json, err := unpackTOC(packed, a.at.plain)
		if err != nil {
			return nil, toc.Invalid(err)
		}
		return json, nil
	}
	json, err := unpackTOC(packed, a.at.plain)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	return json, a.check(json)
}

// check compares what the digest is of.
func (a anchor) check(b []byte) error {
	if a.sum.Algorithm().FromBytes(b) != a.sum {
		return fmt.Errorf("TOC does not have the digest %s that the manifest says: %w", a.sum, errdefs.ErrDataLoss)
	}
	return nil
}

// unpackTOC decompresses a TOC to the given number of bytes.
func unpackTOC(packed []byte, size int64) ([]byte, error) {
	z, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(uint64(max(size, maxWindow))))
	if err != nil {
		return nil, fmt.Errorf("unpack TOC: %w", err)
	}
	defer z.Close()
	var json bytes.Buffer
	n, err := json.ReadFrom(io.LimitReader(z, size+1))
	if err != nil {
		return nil, fmt.Errorf("unpack TOC: %w", err)
	}
	if n != size {
		return nil, fmt.Errorf("TOC does not have the %d bytes that it should", size)
	}
	return json.Bytes(), nil
}
