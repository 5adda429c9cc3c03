package daemon

import (
	"context"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/tatami-containers/tatami/host/class"
	"github.com/tatami-containers/tatami/host/kata"
	"github.com/tatami-containers/tatami/host/service"
	"github.com/tatami-containers/tatami/host/snapshotter"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// work says whose work pulls are, and reads of images that are mounted on the node.
type work struct {
	service.Classes
	pulls   class.Pulls
	bundles *kata.Bundles
	mounted chan struct{} // has an element after an image was mounted

	mu     sync.Mutex
	chosen map[string]class.Choice // by the key of a container's snapshot; protected by mu
}

func newWork(c service.Classes, state string) *work {
	w := &work{Classes: c, bundles: kata.NewBundles(state), mounted: make(chan struct{}, 1), chosen: map[string]class.Choice{}}
	w.mounted <- struct{}{} // by the process before this one
	return w
}

// of is ctx for the pull of a reference by a snapshotter.
func (w *work) of(ctx context.Context, ref, name string) context.Context {
	chosen, id := w.choose(ref, name)
	return sched.With(ctx, sched.NewWork(sched.Standing{Flow: w.Sched.Flow(chosen.Class, "pull "+id), Rank: sched.Demand}))
}

// flow is that of the reads of an image that is mounted on the node, for whatever
// snapshotter, until it is known which containers read it.
func (w *work) flow(c snapshotter.Chain) *sched.Flow {
	select {
	case w.mounted <- struct{}{}:
	default:
	}
	chosen, _ := w.choose(c.Reference, "")
	return w.reads(c, chosen)
}

// reads is the flow of reads that containers of a class share in a mount.
func (w *work) reads(c snapshotter.Chain, chosen class.Choice) *sched.Flow {
	return w.Sched.Flow(chosen.Class, "image "+c.Reference)
}

// choose returns the class of a reference, of the most important of the pods that it is
// known to be for or of none, and who that is.
func (w *work) choose(ref, name string) (chosen class.Choice, id string) {
	chosen, id = w.Rules.Choose(class.Facts{Snapshotter: name}), ref
	for i, p := range w.pulls.Of(ref) {
		c := w.Rules.Choose(p.Facts.With(class.Facts{Snapshotter: name}))
		if i == 0 || w.Rules.Before(c, chosen) {
			chosen, id = c, p.Pod
		}
	}
	return chosen, id
}

// How soon the container is looked for that an image was mounted for, and how long:
// containerd makes its bundle when the snapshot is there.
const (
	classifyEvery  = 200 * time.Millisecond
	classifyWithin = 15 * time.Second
)

// classify gives mounts the class of the containers that read them, until ctx ends. It
// rests when nothing is mounted.
func (l *local) classify(ctx context.Context) {
	tick := time.NewTicker(classifyEvery)
	defer tick.Stop()
	for {
		select {
		case <-l.work.mounted:
		case <-ctx.Done():
			return
		}
		for end := time.Now().Add(classifyWithin); time.Now().Before(end) && ctx.Err() == nil; {
			if l.classifyNow(ctx) {
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}
}

// classifyNow says whether the class of every container is known.
func (l *local) classifyNow(ctx context.Context) (all bool) {
	all = true
	chosen, of := map[string]class.Choice{}, map[snapshotter.Chain]class.Choice{}
	for i, s := range l.all {
		entries, err := s.List(ctx)
		if err != nil {
			return false
		}
		for _, e := range entries {
			if e.Kind != snapshots.KindActive || e.Chain.Manifest == "" || e.Mode == snapshotter.Guest {
				continue
			}
			c, ok := l.work.container(ctx, e.Key, l.cfg.Snapshotters[i].Name)
			if all = all && ok; !ok {
				continue
			}
			chosen[e.Key] = c
			if other, known := of[e.Chain]; !known || l.work.Rules.Before(c, other) {
				of[e.Chain] = c
			}
		}
	}
	for chain, c := range of {
		l.images.SetFlow(chain, l.work.reads(chain, c))
	}
	l.work.mu.Lock()
	defer l.work.mu.Unlock()
	l.work.chosen = chosen
	return all
}

// container chooses the class of the container with a snapshot, once; ok is false while
// it has no bundle.
func (w *work) container(ctx context.Context, key, name string) (_ class.Choice, ok bool) {
	if c, ok := w.classOf(key); ok {
		return c, true
	}
	c, err := w.bundles.Any(snapshotter.ContainerOf(key))
	if err != nil {
		return class.Choice{}, false
	}
	return w.Of(ctx, c, name), true
}

// classOf is the class of the container with a snapshot, if it is known.
func (w *work) classOf(key string) (class.Choice, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, ok := w.chosen[key]
	return c, ok
}
