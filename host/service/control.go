package service

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/node"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// maxConfig leaves room for the rest of an answer in a ttrpc message, which has
// at most 4 MiB.
const maxConfig = 4<<20 - 64<<10

// control is the Node service.
type control struct{ s *Service }

var _ api.NodeService = control{}

// Prepare implements the Node service.
func (c control) Prepare(ctx context.Context, req *api.PrepareRequest) (*api.PrepareResponse, error) {
	class, err := c.s.said(req.Class)
	if err != nil {
		return nil, fmt.Errorf("prepare %.128q: %w", req.Reference, err)
	}
	p, err := c.s.cfg.Node.Prepare(c.s.pulling(ctx, req.Reference, class), req.Reference, req.Platform)
	if err != nil {
		return nil, err
	}
	if len(p.Config) > maxConfig {
		return nil, fmt.Errorf("prepare %s: the image's config of %d bytes does not fit into an answer: %w", req.Reference, len(p.Config), errdefs.ErrInvalidArgument)
	}
	return &api.PrepareResponse{
		ManifestDigest: p.Manifest.String(), Repository: reference.Path(p.Reference), Config: p.Config,
		CompressedSize: p.CompressedSize, ImageSize: p.ImageSize,
		Index: p.Index, Phases: phases(p.Phases), Fetched: p.Fetched,
	}, nil
}

func phases(in []node.Phase) []*api.Phase {
	out := make([]*api.Phase, len(in))
	for i, p := range in {
		out[i] = &api.Phase{Name: p.Name, StartUs: p.Start.Microseconds(), DurationUs: p.Duration.Microseconds()}
	}
	return out
}

// Progress implements the Node service.
func (c control) Progress(_ context.Context, req *api.ProgressRequest) (*api.ProgressResponse, error) {
	p, err := c.s.cfg.Node.Progress(req.Reference)
	if err != nil {
		return nil, err
	}
	return &api.ProgressResponse{Phase: p.Phase, Done: p.Done, Total: p.Total}, nil
}

// Attach implements the Node service.
func (c control) Attach(_ context.Context, req *api.AttachRequest) (*api.AttachResponse, error) {
	err := c.s.attach(req.Sandbox, place{host: req.HostAddress, relay: req.RelayAddress, cid: req.Cid})
	if err != nil {
		return nil, err
	}
	return &api.AttachResponse{}, nil
}

// Detach implements the Node service. The sandbox is over: what it still reads
// is broken off.
func (c control) Detach(ctx context.Context, req *api.DetachRequest) (*api.DetachResponse, error) {
	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := c.s.detach(over, req.Sandbox); err != nil {
		return nil, err
	}
	return &api.DetachResponse{}, nil
}

// AddContainer implements the Node service.
func (c control) AddContainer(ctx context.Context, req *api.AddContainerRequest) (*api.AddContainerResponse, error) {
	class, err := c.s.said(req.Class)
	if err != nil {
		return nil, err
	}
	added, err := newContainer(req.ContainerId, req.Reference, class)
	if err != nil {
		return nil, err
	}
	added.args = req.Args
	manifest, err := c.s.addContainer(ctx, req.Sandbox, added, req.Platform)
	if err != nil {
		return nil, fmt.Errorf("add container %s to sandbox %s: %w", req.ContainerId, req.Sandbox, err)
	}
	return &api.AddContainerResponse{ManifestDigest: manifest.String()}, nil
}

// NodeStats implements the Node service.
func (c control) NodeStats(context.Context, *api.NodeStatsRequest) (*api.NodeStatsResponse, error) {
	stats := c.s.cfg.Node.Stats()
	return &api.NodeStatsResponse{
		Store:         storeStats(stats.Store),
		RegistryBytes: stats.RegistryBytes, RelayBytes: c.s.sent.Load(),
		Images: int64(stats.Images), Sandboxes: int64(c.s.attached()),
		Replays: int64(stats.Replays), ReplayedBytes: stats.ReplayedBytes,
	}, nil
}

func storeStats(s store.Stats) *api.StatsResponse {
	out := &api.StatsResponse{
		Hits: s.Hits, HitBytes: s.HitBytes, Misses: s.Misses, MissBytes: s.MissBytes, WaitUs: s.Wait.Microseconds(),
		VerifyFailures: s.VerifyFailures, ResidentBytes: resident(),
	}
	for _, src := range s.Sources {
		out.Sources = append(out.Sources, &api.SourceStats{Name: src.Name, Requests: src.Requests, Bytes: src.Bytes, Errors: src.Errors})
	}
	return out
}

// resident is the memory of this process in bytes, 0 when it cannot be told
// (proc_pid_statm(5): the second field, in pages).
func resident() int64 {
	data, err := os.ReadFile("/proc/self/statm")
	fields := bytes.Fields(data)
	if err != nil || len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// Pin implements the Node service.
func (c control) Pin(_ context.Context, req *api.PinRequest) (*api.PinResponse, error) {
	if err := c.s.cfg.Node.Pin(req.Reference); err != nil {
		return nil, err
	}
	return &api.PinResponse{}, nil
}

// Unpin implements the Node service.
func (c control) Unpin(_ context.Context, req *api.UnpinRequest) (*api.UnpinResponse, error) {
	if err := c.s.cfg.Node.Unpin(req.Reference); err != nil {
		return nil, err
	}
	return &api.UnpinResponse{}, nil
}

// Remove implements the Node service.
func (c control) Remove(_ context.Context, req *api.RemoveRequest) (*api.RemoveResponse, error) {
	d, err := digest.Parse(req.ManifestDigest)
	if err != nil {
		return nil, fmt.Errorf("manifest digest %.128q: %w: %w", req.ManifestDigest, err, errdefs.ErrInvalidArgument)
	}
	if err := c.s.cfg.Node.Remove(d); err != nil {
		return nil, err
	}
	return &api.RemoveResponse{}, nil
}
