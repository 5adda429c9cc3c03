package service

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/node"
)

// held is a lease that ends when it is closed and its last reader has gone: a
// container may go while its sandbox still reads.
type held struct {
	*node.Lease

	mu      sync.Mutex
	closed  bool // protected by mu
	readers int  // protected by mu
}

// Open implements relay.Image.
func (h *held) Open(ctx context.Context, kind string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	if !h.begin() {
		return nil, fmt.Errorf("read image %s: its container is gone: %w", h.Manifest(), errdefs.ErrNotFound)
	}
	r, err := h.Lease.Open(ctx, kind, d, off, n)
	if err != nil {
		h.end()
		return nil, err
	}
	return &heldReader{ReadCloser: r, h: h}, nil
}

func (h *held) begin() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.readers++
	return true
}

func (h *held) end() {
	h.mu.Lock()
	h.readers--
	last := h.closed && h.readers == 0
	h.mu.Unlock()
	if last {
		h.Lease.Close()
	}
}

// Close gives the lease back, now or with its last reader. It is idempotent.
func (h *held) Close() {
	h.mu.Lock()
	h.closed = true
	idle := h.readers == 0
	h.mu.Unlock()
	if idle {
		h.Lease.Close()
	}
}

type heldReader struct {
	io.ReadCloser
	h    *held
	once sync.Once
}

// Close implements io.Closer.
func (r *heldReader) Close() error {
	defer r.once.Do(r.h.end)
	return r.ReadCloser.Close()
}
