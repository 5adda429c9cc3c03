package node

import (
	"cmp"
	"context"
	"time"
)

// fillDelay is how long a container may start before the rest of its image is fetched,
// when starts are not recorded.
const fillDelay = 30 * time.Second

// FillAfterStart fetches the rest of the image when the container that the lease is for
// has started, in the background, as long as the lease is held. It does nothing where
// that would make the store give up other bytes.
func (l *Lease) FillAfterStart() {
	l.n.background.Go(func() {
		select {
		case <-time.After(cmp.Or(l.n.cfg.Profiles.Record, fillDelay)):
			l.fill(l.n.ctx)
		case <-l.ended:
		case <-l.n.ctx.Done():
		}
	})
}

func (l *Lease) fill(ctx context.Context) {
	if !l.awaitFill(ctx) {
		return
	}
	defer l.n.endFill(l)
	missing := l.open.Size() - l.open.Present()
	if s := l.n.store.Space(); missing == 0 || s.Quota > 0 && s.Used+missing > s.High {
		l.n.log.Debug("the rest of an image is not fetched", "manifest", l.Manifest(), "missing", missing, "used", s.Used, "high", s.High)
		return
	}
	err := l.open.Fill(ctx)
	select {
	case <-l.ended: // which is why it failed, if it did
	default:
		if err != nil && ctx.Err() == nil {
			l.n.log.Warn("the rest of an image could not be fetched", "manifest", l.Manifest(), "error", err)
		}
	}
}

// awaitFill waits until nobody else fills the image: a fill ends with its lease, and then
// the rest is up to the next one. It is false when this lease, or ctx, ends before.
func (l *Lease) awaitFill(ctx context.Context) bool {
	for {
		other := l.n.beginFill(l)
		if other == nil {
			return true
		}
		select {
		case <-other:
		case <-l.ended:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// beginFill returns nil, or what is closed when the fill of the image that is under way
// has ended.
func (n *Node) beginFill(l *Lease) (other <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if now := n.fills[l.Manifest()]; now != nil {
		return now
	}
	n.fills[l.Manifest()] = make(chan struct{})
	return nil
}

func (n *Node) endFill(l *Lease) {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.fills[l.Manifest()])
	delete(n.fills, l.Manifest())
}
