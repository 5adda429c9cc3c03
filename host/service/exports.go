package service

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/export"
	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// openImage opens an image for the virtio-fs device of a sandbox. It may be read
// until it is closed, as an answer of the relay is completed, even if its
// container goes meanwhile.
func (s *Service) openImage(id string, manifest digest.Digest) (export.Image, error) {
	if box, err := s.find(id); err == nil {
		if h := box.hold(manifest); h != nil {
			h.Record(nil, true) // what is on the node already, the device reads unseen
			return newExported(h), nil
		}
	}
	return nil, fmt.Errorf("image %s is of no container of sandbox %s: the node must be told of one (Node.AddContainer), or be asked for it by the guest, before: %w",
		manifest, id, errdefs.ErrNotFound)
}

// hold begins to read an image that a container of the sandbox has; nil when none
// has it.
func (b *sandbox) hold(manifest digest.Digest) *held {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.containers {
		if !b.closed && c.lease.Manifest() == manifest && c.lease.begin() {
			return c.lease
		}
	}
	return nil
}

// has says whether a container runs the image. Precondition: b.mu is held.
func (b *sandbox) has(manifest digest.Digest) bool {
	for _, c := range b.containers {
		if c.lease.Manifest() == manifest {
			return true
		}
	}
	return false
}

// exported is an image of which a device reads.
type exported struct {
	h    *held
	desc sharedimages.Opened
	once sync.Once
}

var _ export.Image = (*exported)(nil)

func newExported(h *held) *exported {
	desc := sharedimages.Opened{Size: h.Size(), Boot: h.Size()}
	for _, g := range h.Segments() {
		desc.Segments = append(desc.Segments, sharedimages.Segment{Off: g.Off, Size: g.Table.Size})
	}
	if len(desc.Segments) > 0 {
		desc.Boot = desc.Segments[0].Off
	}
	return &exported{h: h, desc: desc}
}

// Describe implements export.Image.
func (e *exported) Describe() sharedimages.Opened { return e.desc }

// Boot implements export.Image.
func (e *exported) Boot() (*os.File, error) { return e.h.Boot() }

// Share implements export.Image.
func (e *exported) Share(k int) (state, data *os.File, off int64, err error) {
	s, err := e.h.Share(k)
	if err != nil {
		return nil, nil, 0, err
	}
	return s.State, s.Data, s.Off, nil
}

// ReadAt implements export.Image.
func (e *exported) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return e.h.ReadAt(ctx, p, off)
}

// Flow implements export.Image.
func (e *exported) Flow() *sched.Flow { return e.h.Flow() }

// Close implements export.Image.
func (e *exported) Close() { e.once.Do(e.h.end) }

// left notes that a sandbox has no virtio-fs device any more.
func (s *Service) left(id string, inOrder bool) {
	box, err := s.find(id)
	if err != nil {
		return // it is over, or was never known
	}
	box.mu.Lock()
	defer box.mu.Unlock()
	box.lost = time.Time{}
	if !inOrder {
		box.lost = time.Now()
	}
}

// virtioFS is what the status says of a sandbox's device.
func (b *sandbox) virtioFS() string {
	connected := b.s.exports.Connected(b.id)
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case connected:
		return "connected"
	case !b.lost.IsZero():
		return "lost since " + b.lost.UTC().Format(time.RFC3339)
	}
	return ""
}

// export serves virtio-fs devices on l, or at path without one, until the Service
// is closed.
func (s *Service) export(l *net.UnixListener, path string) error {
	if l == nil {
		var err error
		if l, err = vsock.ListenUnix(sharedimages.Network, path); err != nil {
			return fmt.Errorf("open the socket of virtio-fs devices, %s: %w", path, err)
		}
	}
	s.serving.Go(func() {
		if err := s.exports.Serve(l); err != nil {
			s.log.Error("virtio-fs devices cannot connect any more; restart tatami-host", "error", err)
		}
	})
	return nil
}
