package service

import (
	"context"
	"maps"
	"slices"

	"github.com/tatami-containers/tatami/host/node"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Status implements the Node service.
func (c control) Status(ctx context.Context, _ *api.StatusRequest) (*api.StatusResponse, error) {
	out := &api.StatusResponse{Sandboxes: c.s.status(), Store: storeStatus(c.s.cfg.Node), Schedule: c.s.schedule()}
	if c.s.cfg.Local == nil {
		return out, nil
	}
	var err error
	out.Snapshotters, err = c.s.cfg.Local.Status(ctx)
	return out, err
}

func storeStatus(n *node.Node) *api.StoreStatus {
	s := n.Space()
	return &api.StoreStatus{
		Used: s.Used, Quota: s.Quota, High: s.High, Low: s.Low, Pinned: s.Pinned,
		Evicted: s.Evicted, Refused: s.Refused, Pins: n.Pinned(),
	}
}

// status lists the sandboxes by id.
func (s *Service) status() []*api.SandboxStatus {
	s.mu.Lock()
	boxes := maps.Clone(s.sandboxes)
	s.mu.Unlock()
	var out []*api.SandboxStatus
	for _, id := range slices.Sorted(maps.Keys(boxes)) {
		if box := boxes[id]; box != nil { // else it is being attached
			out = append(out, box.status())
		}
	}
	return out
}

func (b *sandbox) status() *api.SandboxStatus {
	out := &api.SandboxStatus{Id: b.id, Identity: b.at.host, VirtioFs: b.virtioFS()}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(b.containers)) {
		c := b.containers[id]
		out.Containers = append(out.Containers, &api.ContainerStatus{
			Id: id, Reference: c.reference, ManifestDigest: c.lease.Manifest().String(), Class: c.class.Class, ClassReason: c.class.Reason,
		})
	}
	return out
}
