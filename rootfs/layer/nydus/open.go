package nydus

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
)

// Limits of a bootstrap in bytes.
const (
	maxPacked    = 256 << 20
	maxBootstrap = 512 << 20
	maxRatio     = 256 // how much it may grow when it is decompressed
	slack        = 1 << 20
)

// bootstrapName is the file in the bootstrap layer; old images have it at the
// top.
const bootstrapName = "image/image.boot"

// Open makes one layer of a whole Nydus image, whose layers are those of a
// manifest. It reads the bootstrap layer, which is small, and checks it against
// its digest; of the others it reads nothing, or the chunk information where
// chunks share compressed data. blob opens a layer of the manifest.
//
// The data of an OCI reference image is in ordinary gzip layers, which need not
// be in the manifest; Access.Blobs names them, and they are in the same
// repository.
//
// Errors: ErrInvalidArgument for an image that is not valid or not supported,
// ErrDataLoss for bytes that are not what a digest says; those of blob as they
// are.
func Open(ctx context.Context, manifestLayers []layer.Descriptor, blob func(layer.Descriptor) layer.Blob) (*index.Layer, error) {
	desc, _, ok := Detect(manifestLayers)
	if !ok {
		return nil, invalid("no layer of the manifest is the bootstrap of a Nydus image")
	}
	l, err := open(ctx, desc, manifestLayers, blob)
	if err != nil {
		return nil, fmt.Errorf("open Nydus image with bootstrap %s: %w", desc.Digest, err)
	}
	return l, nil
}

func open(ctx context.Context, desc layer.Descriptor, layers []layer.Descriptor, blob func(layer.Descriptor) layer.Blob) (*index.Layer, error) {
	if err := checkPlain(layers); err != nil {
		return nil, err
	}
	boot, err := readBootstrap(ctx, desc, blob(desc))
	if err != nil {
		return nil, err
	}
	f, err := parse(boot)
	if err != nil {
		return nil, err
	}
	for _, b := range f.blobs() {
		if err := prepare(ctx, b, layers, blob); err != nil {
			return nil, fmt.Errorf("blob %s: %w", b.id, err)
		}
	}
	return build(f, desc, layers)
}

// prepare reads what the bootstrap does not say of a blob.
func prepare(ctx context.Context, b *blob, layers []layer.Descriptor, blob func(layer.Descriptor) layer.Blob) error {
	if !b.packed() {
		return nil
	}
	d, err := b.metaBlob()
	if err != nil {
		return err
	}
	for _, desc := range layers {
		if desc.Digest == d {
			b.meta, err = loadMeta(ctx, b, blob(desc))
			return err
		}
	}
	return invalid("its chunk information is in %s, which is not a layer of the manifest; push the image with all its blobs", d)
}

// readBootstrap reads the whole bootstrap layer and returns the file in it.
func readBootstrap(ctx context.Context, desc layer.Descriptor, b layer.Blob) ([]byte, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, invalid("digest of the bootstrap layer: %w", err)
	}
	if desc.Size < 0 || desc.Size > maxPacked {
		return nil, invalid("bootstrap layer of %d bytes is over %d", desc.Size, maxPacked)
	}
	packed, err := layer.ReadRange(ctx, b, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	if desc.Digest.Algorithm().FromBytes(packed) != desc.Digest {
		return nil, fmt.Errorf("bootstrap layer does not have the digest that the manifest says: %w", errdefs.ErrDataLoss)
	}
	boot, err := unpackBootstrap(packed)
	if err != nil {
		return nil, fmt.Errorf("unpack bootstrap layer: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return boot, nil
}

// unpackBootstrap finds the bootstrap in a tar, which may be gzipped.
func unpackBootstrap(packed []byte) ([]byte, error) {
	limit := min(maxBootstrap, maxRatio*int64(len(packed))+slack)
	var plain io.Reader = bytes.NewReader(packed)
	if gzip.IsGzip(packed) {
		var pool gzip.Pool
		z := pool.NewReader(plain)
		defer func() { _ = z.Close() }() // never has an error
		plain = z
	}
	t := tar.NewReader(io.LimitReader(plain, limit))
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("no file %s in its first %d bytes", bootstrapName, limit)
		}
		if err != nil {
			return nil, err
		}
		if name := path.Clean("/" + h.Name); h.Typeflag == tar.TypeReg && (name == "/"+bootstrapName || name == "/"+path.Base(bootstrapName)) {
			if h.Size > limit {
				return nil, fmt.Errorf("bootstrap of %d bytes is over %d", h.Size, limit)
			}
			var boot bytes.Buffer
			_, err := boot.ReadFrom(t)
			return boot.Bytes(), err
		}
	}
}
