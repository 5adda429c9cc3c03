package service

import (
	"context"
	"maps"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/mount"
)

// completeEvery is how often mounted images are looked at: whether all their
// bytes have come.
const completeEvery = 2 * time.Second

// SwitchComplete takes this process out of the path of images that are
// complete: where the store keeps bytes, such an image becomes one local file,
// and its loop device is switched to that. It returns when ctx ends.
func (g *Guest) SwitchComplete(ctx context.Context) error {
	if !g.cfg.Keep {
		return nil
	}
	tick := time.NewTicker(completeEvery)
	defer tick.Stop()
	settled := make(map[digest.Digest]bool) // switched, or failed to
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			g.switchComplete(ctx, settled)
		}
	}
}

func (g *Guest) switchComplete(ctx context.Context, settled map[digest.Digest]bool) {
	mounted := make(map[digest.Digest]mount.Record)
	for _, r := range g.cfg.Mounter.List() {
		if r.State == mount.Mounted && r.Path == mount.LoopPath {
			mounted[r.Manifest] = r
		}
	}
	maps.DeleteFunc(settled, func(m digest.Digest, _ bool) bool { _, ok := mounted[m]; return !ok })
	for m, r := range mounted {
		if settled[m] {
			continue
		}
		done, err := g.switchImage(ctx, r)
		settled[m] = done || err != nil && ctx.Err() == nil
		if settled[m] {
			g.cfg.Log.Info("image is complete", "manifest", m, "reference", r.Reference, "error", err)
		}
	}
}

// switchImage reports whether the image was complete.
func (g *Guest) switchImage(ctx context.Context, r mount.Record) (bool, error) {
	img, err := g.open(ctx, r.Reference, r.Manifest)
	if err != nil {
		return false, err
	}
	defer func() { _ = img.Close() }() // nothing was written through it
	if !img.Complete() {
		return false, nil
	}
	path, err := img.Materialize(ctx)
	if err != nil {
		return true, err
	}
	return true, g.cfg.Mounter.SwitchToLocal(ctx, r.Manifest, path)
}
