package service

import (
	"cmp"
	"context"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/guest/images"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/store"
)

const (
	// startLimit is how long a start is followed when the node does not say how long.
	startLimit = 30 * time.Second
	// startQuiet is how long a container that has begun to read reads nothing new before
	// it counts as started; startLook is how often that is looked at.
	startQuiet = 5 * time.Second
	startLook  = time.Second
	// maxTouches bounds a recording: the node takes messages of 64 KiB.
	maxTouches = 3072
	// recordTimeout bounds telling the node what was recorded, for which somebody who
	// unmounts waits.
	recordTimeout = 2 * time.Second
	// maxAwaiting is how many containers at a time the node is asked about, on a
	// connection each, of which it takes 16.
	maxAwaiting = 4
)

// Recorder is the part of the node's Host service that is about how containers start.
type Recorder interface {
	RecordStart(ctx context.Context, req *api.RecordStartRequest) (*api.RecordStartResponse, error)
	AwaitReady(ctx context.Context, req *api.AwaitReadyRequest) (*api.AwaitReadyResponse, error)
}

// starts are the containers that were mounted lately and may still be starting. They
// are forgotten when this process ends, which costs their recordings.
type starts struct {
	mu       sync.Mutex
	byID     map[string]*start // by mount; protected by mu
	awaiting int               // protected by mu
}

// start is a container from its mount until it is ready. What is read meanwhile is
// recorded for the node, and what earlier starts read is fetched.
type start struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// expect prepares to follow the start of a container whose image is about to be mounted
// through file. begin is called when it is mounted. It does nothing when the node
// neither knows nor wants to know anything, and when the image is mounted already: then
// file is not what is read, and what is in the page cache is not read again.
func (g *Guest) expect(id string, img *images.Image, file *store.Image) (begin func()) {
	want := img.Start
	if g.cfg.Starts == nil || want.Record == 0 && len(want.Profile) == 0 || g.isMounted(img.Manifest) {
		return func() {}
	}
	rec := file.Record(maxTouches)
	return func() {
		ctx, cancel := context.WithCancel(g.ctx)
		s := &start{cancel, make(chan struct{})}
		g.starts.add(id, s)
		g.background.Go(func() {
			defer g.starts.drop(id, s)
			g.follow(ctx, id, want, rec)
		})
	}
}

func (g *Guest) isMounted(manifest digest.Digest) bool {
	for _, r := range g.cfg.Mounter.List() {
		if r.Manifest == manifest && r.State == mount.Mounted {
			return true
		}
	}
	return false
}

// follow replays and records until the container is ready or gone.
func (g *Guest) follow(ctx context.Context, id string, want images.Start, rec *store.Recording) {
	if unlock, err := g.ids.Lock(ctx, id); err == nil { // Mount has answered
		unlock()
	}
	starting, stop := context.WithCancel(ctx)
	told := make(chan struct{})
	var beside sync.WaitGroup
	if want.Budget > 0 {
		beside.Go(func() { g.replay(starting, id, want, rec) })
	}
	if want.Record > 0 {
		beside.Go(func() { g.awaitReady(starting, id, told) })
	}
	waitUntilReady(ctx, cmp.Or(want.Record, startLimit), rec.Last, told)
	stop()
	beside.Wait()
	if touches := rec.Stop(); want.Record > 0 && len(touches) > 0 {
		g.recordStart(id, touches)
	}
}

func (g *Guest) replay(ctx context.Context, id string, want images.Start, rec *store.Recording) {
	if err := rec.Replay(ctx, want.Profile, want.Budget); err != nil {
		g.cfg.Log.Warn("what earlier starts read cannot be fetched ahead", "id", id, "error", err)
	}
}

// awaitReady closes told when the node has heard that the container is ready. Of a node
// that cannot say so it never hears.
func (g *Guest) awaitReady(ctx context.Context, id string, told chan<- struct{}) {
	if !g.starts.beginAwaiting() {
		return
	}
	defer g.starts.endAwaiting()
	_, err := g.cfg.Starts.AwaitReady(ctx, &api.AwaitReadyRequest{ContainerId: id})
	if err == nil {
		close(told)
	} else if ctx.Err() == nil {
		g.cfg.Log.Debug("the node does not say when a container is ready", "id", id, "error", err)
	}
}

// waitUntilReady returns when the container has read nothing new for a while, when the
// time is over, when told is closed, or when ctx ends. last is when it read something
// new; zero: never yet.
func waitUntilReady(ctx context.Context, limit time.Duration, last func() time.Time, told <-chan struct{}) {
	over, look := time.NewTimer(limit), time.NewTicker(startLook)
	defer over.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-told:
			return
		case <-over.C:
			return
		case <-look.C:
			if at := last(); !at.IsZero() && time.Since(at) >= startQuiet {
				return
			}
		}
	}
}

// recordStart tells the node, once: without that, later starts are only slower. A
// process that ends has only a part and keeps it to itself.
func (g *Guest) recordStart(id string, touches []store.Touch) {
	ctx, cancel := context.WithTimeout(g.ctx, recordTimeout)
	defer cancel()
	if ctx.Err() != nil {
		return
	}
	_, err := g.cfg.Starts.RecordStart(ctx, recorded(id, touches))
	switch {
	case err == nil:
		g.cfg.Log.Debug("start recorded", "id", id, "ranges", len(touches))
	case errdefs.IsNotImplemented(err): // a node that does not keep such things
	default:
		g.cfg.Log.Warn("the node did not take what a start has read", "id", id, "error", err)
	}
}

func recorded(id string, touches []store.Touch) *api.RecordStartRequest {
	req := &api.RecordStartRequest{ContainerId: id}
	for _, t := range touches {
		req.Ranges = append(req.Ranges, &api.Range{Offset: t.Off, Length: t.Len})
		req.AfterMs = append(req.AfterMs, uint32(t.After.Milliseconds()))
	}
	return req
}

func (s *starts) beginAwaiting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.awaiting >= maxAwaiting {
		return false
	}
	s.awaiting++
	return true
}

func (s *starts) endAwaiting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaiting--
}

// add replaces what there is of an earlier mount of this id.
func (s *starts) add(id string, added *start) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID == nil {
		s.byID = make(map[string]*start)
	}
	if old := s.byID[id]; old != nil {
		old.cancel()
	}
	s.byID[id] = added
}

func (s *starts) drop(id string, ended *start) {
	ended.cancel()
	close(ended.done)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID[id] == ended {
		delete(s.byID, id)
	}
}

// end says that a container is gone, and waits until the node was told what it read.
func (s *starts) end(id string) {
	s.mu.Lock()
	st := s.byID[id]
	s.mu.Unlock()
	if st != nil {
		st.cancel()
		<-st.done
	}
}

// keepOnly ends those that are not mounted any more.
func (s *starts) keepOnly(mounts []*api.Mount) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := make(map[string]bool)
	for id := range s.byID {
		gone[id] = true
	}
	for _, m := range mounts {
		delete(gone, m.Id)
	}
	for id := range gone {
		s.byID[id].cancel()
	}
}
