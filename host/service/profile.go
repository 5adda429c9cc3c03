package service

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/profile"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/pathlist"
)

// Profile says what is done about the starts of containers.
type Profile struct {
	Record time.Duration // how long a guest notes what a start reads; 0: not at all
	Budget int64         // bytes that a guest may have fetched ahead of its reads
}

// maxRecorded bounds the ranges of one RecordStart; what strict lets through has room
// for about as many.
const maxRecorded = 3072

// start is what is known of how a container starts.
type start struct {
	over     chan struct{} // closed when the container is ready
	reported chan struct{} // closed when the guest has reported

	mu       sync.Mutex
	awaited  bool          // a guest waits for over, and reports then; protected by mu
	since    time.Time     // when the guest asked for it first; zero: not yet; protected by mu
	told     int           // how often the guest was told of earlier starts; protected by mu
	ready    time.Duration // after since; 0: nobody has said so; protected by mu
	recorded bool          // protected by mu
}

// maxTold is how often a guest is told what earlier starts read. It needs that once, and
// finding it out takes milliseconds.
const maxTold = 8

func newStart() *start {
	return &start{over: make(chan struct{}), reported: make(chan struct{})}
}

// begin notes that the guest asks for the container. It is false when it has asked
// often enough.
func (s *start) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.since.IsZero() {
		s.since = time.Now()
	}
	s.told++
	return s.told <= maxTold
}

// end notes that the container is ready.
func (s *start) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready == 0 && !s.since.IsZero() {
		s.ready = max(time.Since(s.since), 1)
		close(s.over)
	}
}

// record is true once; until says when the start ended, 0 if nobody said so.
func (s *start) record() (until time.Duration, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ok = !s.recorded
	s.recorded = true
	return s.ready, ok
}

// describeStart adds to an answer what is known of earlier starts.
func (b *sandbox) describeStart(c container, out *api.DescribeResponse) {
	cfg := b.s.cfg.Profile
	out.RecordUs, out.ProfileBudget = cfg.Record.Microseconds(), cfg.Budget
	if !c.start.begin() {
		return
	}
	for _, r := range c.lease.Profile(c.args) {
		out.Profile = append(out.Profile, &api.Range{Offset: r.Off, Length: r.Len})
	}
}

// RecordStart implements the Host service. What a guest says can at most have chunks of
// its own image prefetched; it is taken once.
func (b *sandbox) RecordStart(_ context.Context, req *api.RecordStartRequest) (*api.RecordStartResponse, error) {
	c, ok := b.container(req.ContainerId)
	if !ok || !c.lease.begin() {
		return nil, unknownContainer(req.ContainerId)
	}
	defer c.lease.end()
	if b.s.cfg.Profile.Record == 0 {
		return nil, fmt.Errorf("this node records no starts: %w", errdefs.ErrNotImplemented)
	}
	if n, m := len(req.Ranges), len(req.AfterMs); n > maxRecorded || m != 0 && m != n {
		return nil, fmt.Errorf("%d ranges with %d times: give at most %d of each: %w", n, m, maxRecorded, errdefs.ErrInvalidArgument)
	}
	until, first := c.start.record()
	if !first {
		return &api.RecordStartResponse{}, nil
	}
	defer close(c.start.reported)
	if err := c.lease.RecordStart(c.args, before(req, until), false); err != nil {
		b.quiet.do(func() { b.s.log.Warn("a start is not recorded", "sandbox", b.id, "container", c.id, "error", err) })
		return nil, fmt.Errorf("record the start of container %s: %w", c.id, errdefs.Resolve(err))
	}
	return &api.RecordStartResponse{}, nil
}

// before are the ranges that were read before the container was ready.
func before(req *api.RecordStartRequest, until time.Duration) []index.Range {
	var out []index.Range
	for i, r := range req.Ranges {
		if until > 0 && i < len(req.AfterMs) && time.Duration(req.AfterMs[i])*time.Millisecond > until {
			break
		}
		out = append(out, index.Range{Off: r.GetOffset(), Len: r.GetLength()})
	}
	return out
}

// ListProfiles implements the Node service.
func (c control) ListProfiles(context.Context, *api.ListProfilesRequest) (*api.ListProfilesResponse, error) {
	out := &api.ListProfilesResponse{}
	for _, p := range c.s.cfg.Node.Profiles() {
		ranges := p.Replay()
		out.Profiles = append(out.Profiles, &api.Profile{
			ManifestDigest: p.Manifest.String(), Reference: p.Reference, Entrypoint: p.Entrypoint, Command: p.Command,
			Runs: int64(p.Runs), Ranges: int64(len(ranges)), Bytes: profile.Bytes(ranges), Source: string(p.Source),
		})
	}
	return out, nil
}

// ExportProfile implements the Node service.
func (c control) ExportProfile(ctx context.Context, req *api.ExportProfileRequest) (*api.ExportProfileResponse, error) {
	lease, err := c.s.cfg.Node.LeaseNamed(ctx, req.Image)
	if err != nil {
		return nil, err
	}
	defer lease.Close()
	paths, err := lease.ExportProfile(req.Entrypoint)
	if err != nil {
		return nil, err
	}
	return &api.ExportProfileResponse{Paths: paths}, nil
}

// ImportProfile implements the Node service.
func (c control) ImportProfile(ctx context.Context, req *api.ImportProfileRequest) (*api.ImportProfileResponse, error) {
	paths, err := pathlist.Read(bytes.NewReader(req.Paths))
	if err != nil {
		return nil, fmt.Errorf("import a profile: %w", err)
	}
	lease, err := c.s.cfg.Node.LeaseNamed(ctx, req.Image)
	if err != nil {
		return nil, err
	}
	defer lease.Close()
	done, err := lease.ImportProfile(paths)
	if err != nil {
		return nil, err
	}
	return &api.ImportProfileResponse{Known: int64(done.Known), Unknown: int64(done.Unknown), Bytes: done.Bytes}, nil
}

// PushProfile implements the Node service.
func (c control) PushProfile(ctx context.Context, req *api.PushProfileRequest) (*api.PushProfileResponse, error) {
	lease, err := c.s.cfg.Node.LeaseNamed(ctx, req.Image)
	if err != nil {
		return nil, err
	}
	defer lease.Close()
	desc, err := lease.PushProfile(ctx)
	if err != nil {
		return nil, err
	}
	return &api.PushProfileResponse{Digest: desc.Digest.String()}, nil
}

// RemoveProfile implements the Node service.
func (c control) RemoveProfile(_ context.Context, req *api.RemoveProfileRequest) (*api.RemoveProfileResponse, error) {
	d, err := c.s.cfg.Node.Named(req.Image)
	if err != nil {
		return nil, err
	}
	c.s.cfg.Node.RemoveProfiles(d)
	return &api.RemoveProfileResponse{}, nil
}

// EndRecording implements the Node service.
func (c control) EndRecording(ctx context.Context, req *api.EndRecordingRequest) (*api.EndRecordingResponse, error) {
	d, err := c.s.ready(ctx, req.ContainerId)
	if err != nil {
		return nil, err
	}
	c.s.cfg.Node.EndRecordings(d)
	return &api.EndRecordingResponse{}, nil
}

// ready notes that a container is ready and returns its image, when the guest has
// reported if it does so at once.
func (s *Service) ready(ctx context.Context, id string) (digest.Digest, error) {
	s.mu.Lock()
	boxes := make([]*sandbox, 0, len(s.sandboxes))
	for _, box := range s.sandboxes {
		if box != nil { // else it is being attached
			boxes = append(boxes, box)
		}
	}
	s.mu.Unlock()
	for _, box := range boxes {
		if c, ok := box.container(id); ok {
			c.start.end()
			c.start.awaitReport(ctx)
			return c.lease.Manifest(), nil
		}
	}
	if s.cfg.Local != nil {
		if img, err := s.cfg.Local.Lookup(ctx, id); err == nil && img.Manifest != "" {
			return img.Manifest, nil
		}
	}
	return "", fmt.Errorf("container %.64q is not known to this node: %w", id, errdefs.ErrNotFound)
}
