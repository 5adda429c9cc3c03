// Package layertest compares what a format's reader makes of a converted layer
// with the tar that it was converted from. For tests.
package layertest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/layer"
)

// Blob is a layer.Blob in memory that counts requests.
type Blob struct {
	Data     []byte
	Requests atomic.Int64
}

// Size implements layer.Blob.
func (b *Blob) Size() int64 { return int64(len(b.Data)) }

// ReadRange implements layer.Blob.
func (b *Blob) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	b.Requests.Add(1)
	if off < 0 || n < 0 || off > b.Size()-n {
		return nil, fmt.Errorf("range %d+%d of %d", off, n, b.Size())
	}
	return io.NopCloser(bytes.NewReader(b.Data[off : off+n])), nil
}

// Descriptor describes the blob as a manifest would.
func (b *Blob) Descriptor(annotations map[string]string) layer.Descriptor {
	return layer.Descriptor{Digest: digest.FromBytes(b.Data), Size: b.Size(), Annotations: annotations}
}
