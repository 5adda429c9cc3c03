package layer

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Descriptor names a blob: digest, size in bytes and media type.
type Descriptor = ocispec.Descriptor

// Blob is a layer's blob as it is stored in a registry.
type Blob interface {
	// Size is the blob's length in bytes.
	Size() int64
	// ReadRange reads n bytes from offset off on. The stream fails with
	// io.ErrUnexpectedEOF when it has fewer.
	ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// Waiting returns b, for which worker waits.
func Waiting(b Blob, worker *sched.Worker) Blob {
	if worker == nil {
		return b
	}
	return waiting{b, worker}
}

type waiting struct {
	Blob
	worker *sched.Worker
}

// ReadRange implements Blob.
func (w waiting) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	var body io.ReadCloser
	var err error
	again := w.worker.Wait(func() error {
		body, err = w.Blob.ReadRange(ctx, off, n)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if again != nil {
		_ = body.Close() // nobody will read it
		return nil, again
	}
	return waited{w.worker.Reader(body), body}, nil
}

// waited is a body with another way to read it.
type waited struct {
	io.Reader
	io.Closer
}

// CheckMediaType tells whether Build can read layers of a media type. An empty
// one is accepted: compression is found by looking at the blob.
func CheckMediaType(mediaType string) error {
	switch mediaType {
	case "",
		"application/vnd.oci.image.layer.v1.tar",
		"application/vnd.oci.image.layer.v1.tar+gzip",
		"application/vnd.oci.image.layer.v1.tar+zstd",
		"application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
		"application/vnd.docker.image.rootfs.diff.tar",
		"application/vnd.docker.image.rootfs.diff.tar.gzip",
		"application/vnd.docker.image.rootfs.diff.tar.zstd",
		"application/vnd.docker.image.rootfs.foreign.diff.tar",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":
		return nil
	}
	return fmt.Errorf("layers of media type %q are not supported; push the image with tar, tar+gzip or tar+zstd layers: %w",
		mediaType, errdefs.ErrInvalidArgument)
}
