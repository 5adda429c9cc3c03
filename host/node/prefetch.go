package node

import (
	"context"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/store"
)

// prefetchStep is how much of a hint is fetched at a time, in bytes: a publisher
// may hint at whole images, and readers are waiting behind it.
const prefetchStep = 8 << 20

// prefetch is the fetching of what an image's publisher says that a start will
// read.
type prefetch struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// startPrefetch fetches what the publisher of an image hints at, in the
// background, before a sandbox asks for it. Removing the image ends it.
func (n *Node) startPrefetch(ref reference.Named, manifest digest.Digest) {
	r, ok := n.known(manifest)
	if !ok {
		return
	}
	ctx, cancel := context.WithCancel(n.ctx)
	p := &prefetch{cancel, make(chan struct{})}
	if !n.beginPrefetch(manifest, p) {
		cancel()
		return
	}
	n.background.Go(func() {
		defer close(p.done)
		defer n.endPrefetch(manifest, p)
		src := &source{n: n, repo: n.cfg.Registry.Repository(ref), layers: r.Layers}
		if err := n.prefetch(ctx, manifest, src); err != nil && ctx.Err() == nil {
			n.log.Warn("what the image hints at could not be prefetched", "manifest", manifest, "error", err)
		}
	})
}

// beginPrefetch is false when the image is being prefetched already, or gone.
func (n *Node) beginPrefetch(manifest digest.Digest, p *prefetch) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.prefetches[manifest] != nil || n.images[manifest] == nil {
		return false
	}
	n.prefetches[manifest] = p
	return true
}

func (n *Node) endPrefetch(manifest digest.Digest, p *prefetch) {
	p.cancel()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.prefetches[manifest] == p {
		delete(n.prefetches, manifest)
	}
}

// stopPrefetch ends the prefetching of an image and waits for it.
func (n *Node) stopPrefetch(manifest digest.Digest) {
	n.mu.Lock()
	p := n.prefetches[manifest]
	n.mu.Unlock()
	if p != nil {
		p.cancel()
		<-p.done
	}
}

func (n *Node) prefetch(ctx context.Context, manifest digest.Digest, src store.Source) error {
	img, err := n.store.LoadImage(ctx, manifest, []store.Source{src})
	if err != nil {
		return err
	}
	defer func() { _ = img.Close() }() // it has nothing to report
	for _, s := range img.Segments() {
		for _, r := range s.Prefetch {
			for off, end := r.Off, r.Off+r.Len; off < end; off += prefetchStep {
				if err := img.Prefetch(ctx, s.Off+off, min(prefetchStep, end-off)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
