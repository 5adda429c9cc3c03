package service

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// reportWithin is how long a guest that waits to hear that its container is ready may
// take to report what it has recorded.
const reportWithin = 3 * time.Second

// AwaitReady implements the Host service. The container need not be known any more when
// the wait ends.
func (b *sandbox) AwaitReady(ctx context.Context, req *api.AwaitReadyRequest) (*api.AwaitReadyResponse, error) {
	c, ok := b.container(req.ContainerId)
	if !ok {
		return nil, unknownContainer(req.ContainerId)
	}
	if b.s.cfg.Profile.Record == 0 {
		return nil, fmt.Errorf("this node records no starts: %w", errdefs.ErrNotImplemented)
	}
	c.start.await()
	limit := time.NewTimer(b.s.cfg.Profile.Record)
	defer limit.Stop()
	select {
	case <-c.start.over:
	case <-limit.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-b.ctx.Done():
		return nil, fmt.Errorf("sandbox %s is detached: %w", b.id, errdefs.ErrUnavailable)
	}
	return &api.AwaitReadyResponse{}, nil
}

// await notes that the guest reports when the container is ready.
func (s *start) await() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaited = true
}

// awaitReport gives a guest that has been told just now the time to report.
func (s *start) awaitReport(ctx context.Context) {
	s.mu.Lock()
	awaited := s.awaited
	s.mu.Unlock()
	if !awaited {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, reportWithin)
	defer cancel()
	select {
	case <-s.reported:
	case <-ctx.Done():
	}
}
