package estargz

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
	"github.com/tatami-containers/tatami/rootfs/layer/toc"
)

// TOCDigest is the annotation of a layer in its manifest that makes it an
// eStargz layer.
const TOCDigest = "containerd.io/snapshot/stargz/toc.digest"

// How much of the end of a blob is asked for before it is known where the TOC
// begins: with luck all of it, and then no second request is needed. TOCs take
// up to about one percent of a blob.
const (
	tailShare = 100
	minTail   = 512 << 10
	maxTail   = 4 << 20
)

// TOC is the digest in a layer's annotations that identifies and binds its TOC:
// that of the JSON. It is false when there is none.
func TOC(annotations map[string]string) (digest.Digest, bool) {
	d, err := digest.Parse(annotations[TOCDigest])
	return d, err == nil
}

// Open makes a layer out of the TOC of an eStargz blob, with one or two ranges
// of it. sum is the TOC's digest from the manifest (annotation TOCDigest); the
// blob's own digest cannot be checked without reading all of it.
//
// Errors: ErrInvalidArgument for a blob that is not eStargz or whose TOC is not
// valid, ErrDataLoss if the TOC is not the one that sum names, ErrNotFound if it
// is in another image (see FindExternal); those of b as they are.
func Open(ctx context.Context, b layer.Blob, desc layer.Descriptor, sum digest.Digest) (*index.Layer, error) {
	l, err := open(ctx, b, desc, sum)
	if err != nil {
		return nil, fmt.Errorf("open eStargz layer %s: %w", desc.Digest, err)
	}
	return l, nil
}

func open(ctx context.Context, b layer.Blob, desc layer.Descriptor, sum digest.Digest) (*index.Layer, error) {
	tailSize := min(max(desc.Size/tailShare, minTail), maxTail, desc.Size)
	tail, err := layer.ReadRange(ctx, b, desc.Size-tailSize, tailSize)
	if err != nil {
		return nil, err
	}
	footer, off, err := parseFooter(tail)
	if err != nil {
		return nil, err
	}
	size := desc.Size - footer - off
	if size <= 0 || size > toc.MaxSize {
		return nil, toc.Invalid(fmt.Errorf("footer says that the TOC begins at byte %d of %d", off, desc.Size))
	}
	json, err := readTOC(ctx, b, off, size, tail[:tailSize-footer])
	if err != nil {
		return nil, err
	}
	return parse(json, desc, off, sum)
}

// parse makes a layer of a TOC's JSON if it has the digest sum. The data of the
// blob ends at byte end.
func parse(json []byte, desc layer.Descriptor, end int64, sum digest.Digest) (*index.Layer, error) {
	if err := sum.Validate(); err != nil {
		return nil, toc.Invalid(fmt.Errorf("TOC digest %q: %w", sum, err))
	}
	if sum.Algorithm().FromBytes(json) != sum {
		return nil, fmt.Errorf("TOC does not have the digest %s that the manifest says: %w", sum, errdefs.ErrDataLoss)
	}
	return toc.Parse(json, desc, end, toc.Format{Codec: index.GzipMember, Marked: true})
}

// readTOC returns the TOC's JSON. It is size bytes compressed from off on; the
// end of them is the end of tail.
func readTOC(ctx context.Context, b layer.Blob, off, size int64, tail []byte) ([]byte, error) {
	have := int64(len(tail))
	if size <= have {
		return unpackTOC(bytes.NewReader(tail[have-size:]), size)
	}
	r, err := b.ReadRange(ctx, off, size-have)
	if err != nil {
		return nil, err
	}
	json, err := unpackTOC(io.MultiReader(r, bytes.NewReader(tail)), size)
	if closeErr := r.Close(); err == nil {
		err = closeErr
	}
	return json, err
}

// unpackTOC reads the tar.gz of one file that a TOC is stored as.
func unpackTOC(r io.Reader, size int64) ([]byte, error) {
	var pool gzip.Pool
	z := pool.NewReader(r)
	defer func() { _ = z.Close() }() // never has an error
	t := tar.NewReader(z)
	h, err := t.Next()
	if err != nil {
		return nil, badTOC(err)
	}
	if h.Name != toc.Name || h.Typeflag != tar.TypeReg {
		return nil, toc.Invalid(fmt.Errorf("file %q in place of the TOC", h.Name))
	}
	if h.Size > toc.Limit(size) {
		return nil, toc.Invalid(fmt.Errorf("TOC of %d bytes, compressed to %d", h.Size, size))
	}
	var json bytes.Buffer
	if _, err := json.ReadFrom(t); err != nil {
		return nil, badTOC(err)
	}
	return json.Bytes(), nil
}

// badTOC is the error for a TOC that cannot be unpacked.
func badTOC(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, tar.ErrHeader) {
		err = toc.Invalid(err)
	}
	return fmt.Errorf("unpack TOC: %w", err)
}
