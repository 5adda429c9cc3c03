package node

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/host/profile"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// How a replay fetches: steps of so many bytes, as readers wait behind them and a
// publisher may hint at whole images, and so many at a time, as a link has a delay.
const (
	replayStep     = 8 << 20
	replayParallel = 4
)

// replayKey names a replay: of an image, for a command (profile.Key).
type replayKey struct {
	manifest digest.Digest
	command  string
}

// replay is the fetching of what a start will read, before it does.
type replay struct {
	n      *Node
	key    replayKey
	repo   *registry.Repository
	look   bool        // for what was published, if the node knows nothing itself
	flow   *sched.Flow // whom it was begun for
	work   *sched.Work // of whom it is for
	cancel context.CancelFunc
	done   chan struct{}

	mu   sync.Mutex
	open *store.Image // while it fetches; protected by mu
}

// promote lets the replay be for another flow as well: for that of the more important
// class.
func (r *replay) promote(f *sched.Flow) {
	if !r.work.Promote(sched.Standing{Flow: f, Rank: sched.Prefetch}) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open != nil {
		r.open.SetFlow(r.work.Standing().Flow)
	}
}

// use lets the replay fetch through img, for whom it is from now on; nil ends that.
func (r *replay) use(img *store.Image) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open = img
	if img != nil {
		img.SetFlow(r.work.Standing().Flow)
	}
}

// startReplay fetches what starts of an image will read, in the background. When that
// is under way already, it becomes as urgent as r. Removing the image ends it.
func (n *Node) startReplay(r *replay) {
	ctx, cancel := context.WithCancel(n.ctx)
	r.n, r.cancel, r.done = n, cancel, make(chan struct{})
	r.work = sched.NewWork(sched.Standing{Flow: r.flow, Rank: sched.Prefetch})
	if now := n.beginReplay(r); now != r {
		cancel()
		if now != nil {
			now.promote(r.flow)
		}
		return
	}
	n.background.Go(func() {
		defer close(r.done)
		defer n.endReplay(r)
		if err := r.run(ctx); err != nil && ctx.Err() == nil {
			n.log.Warn("what a start will read could not be fetched ahead", "manifest", r.key.manifest, "error", err)
		}
	})
}

// beginReplay returns the replay that is under way: r, or such a one that was before it;
// nil when the image is gone.
func (n *Node) beginReplay(r *replay) *replay {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.images[r.key.manifest] == nil {
		return nil
	}
	if n.replays[r.key] == nil {
		n.replays[r.key] = r
	}
	return n.replays[r.key]
}

func (n *Node) endReplay(r *replay) {
	r.cancel()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.replays[r.key] == r {
		delete(n.replays, r.key)
	}
}

// stopReplays ends the replays of an image and waits for them.
func (n *Node) stopReplays(manifest digest.Digest) {
	n.mu.Lock()
	var all []*replay
	for k, r := range n.replays {
		if k.manifest == manifest {
			all = append(all, r)
		}
	}
	n.mu.Unlock()
	for _, r := range all {
		r.cancel()
		<-r.done
	}
}

func (r *replay) run(ctx context.Context) error {
	ctx = sched.With(ctx, r.work)
	rec, ok := r.n.known(r.key.manifest)
	if !ok {
		return nil
	}
	src := &source{n: r.n, repo: r.repo, layers: rec.Layers}
	img, err := r.n.store.LoadImage(ctx, r.key.manifest, []store.Source{src})
	if err != nil {
		return err
	}
	defer func() { _ = img.Close() }() // it has nothing to report
	r.use(img)
	defer r.use(nil)
	r.look = r.look && !img.Complete()
	return r.fetch(ctx, img, r.wanted(ctx, rec, img.Segments()))
}

// wanted lists what to fetch, the first first: as the profile says, or one that was
// published, or the publisher of the index.
func (r *replay) wanted(ctx context.Context, rec *record, segments []index.Segment) []index.Range {
	p := r.n.loadProfile(r.key.manifest, r.key.command)
	if p == nil && r.look {
		p = r.n.findProfile(ctx, r.repo, rec, segments)
	}
	if p != nil {
		return placed(segments, profile.Plan(p.Replay(), replayGap))
	}
	return hints(segments)
}

// hints are what the publisher of an image's index says that a start will read.
func hints(segments []index.Segment) []index.Range {
	var out []index.Range
	for _, s := range segments {
		for _, h := range s.Prefetch {
			out = append(out, index.Range{Off: s.Off + h.Off, Len: h.Len})
		}
	}
	return out
}

// fetch fetches ranges of an image about in their order.
func (r *replay) fetch(ctx context.Context, img *store.Image, ranges []index.Range) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(replayParallel)
	for _, part := range ranges {
		for off, end := part.Off, part.Off+part.Len; off < end && ctx.Err() == nil; off += replayStep {
			g.Go(func() error {
				n := min(replayStep, end-off)
				err := img.Prefetch(ctx, off, n)
				if err == nil {
					r.n.replayed.Add(n)
				}
				return err
			})
		}
	}
	return g.Wait()
}

// Replay fetches what starts of a command read, in the background, for whom the lease
// is. Without words it is what any start does.
func (l *Lease) Replay(args []string) {
	key := replayKey{l.Manifest(), profile.Key(args)}
	if l.n.hasProfile(key.manifest, key.command) {
		l.n.startReplay(&replay{key: key, repo: l.repo, flow: l.Flow()})
	}
}
