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

// switchAgain is the pause after a switch that failed, as on a full disk.
const switchAgain = time.Minute

// SwitchComplete takes this process out of the path of images that are
// complete: where the store keeps bytes, such an image becomes one local file,
// and its loop device is switched to that. It returns when ctx ends.
func (g *Guest) SwitchComplete(ctx context.Context) error {
	if !g.cfg.Keep {
		return nil
	}
	g.pinMounted() // what an earlier process has switched
	g.cfg.Store.Release()
	tick := time.NewTicker(completeEvery)
	defer tick.Stop()
	tried := make(map[digest.Digest]time.Time)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			g.switchComplete(ctx, tried)
		}
	}
}

// tried says when the switch of an image failed last.
func (g *Guest) switchComplete(ctx context.Context, tried map[digest.Digest]time.Time) {
	waiting := make(map[digest.Digest]mount.Record)
	for _, r := range g.cfg.Mounter.List() {
		if r.State == mount.Mounted && r.Path == mount.LoopPath && !g.cfg.Mounter.Local(r.Manifest) {
			waiting[r.Manifest] = r
		}
	}
	maps.DeleteFunc(tried, func(m digest.Digest, _ time.Time) bool { _, ok := waiting[m]; return !ok })
	for m, r := range waiting {
		if time.Since(tried[m]) < switchAgain {
			continue
		}
		switch done, err := g.switchImage(ctx, r); {
		case ctx.Err() != nil:
		case err != nil:
			tried[m] = time.Now()
			g.cfg.Log.Warn("image stays with the daemon", "manifest", m, "reference", r.Reference, "error", err)
		case done:
			g.cfg.Log.Info("image is read from a local file", "manifest", m, "reference", r.Reference)
		}
	}
}

// switchImage reports whether the image was complete.
func (g *Guest) switchImage(ctx context.Context, r mount.Record) (bool, error) {
	img, err := g.open(ctx, r.Reference, r.Manifest, r.Size)
	if err != nil {
		return false, err
	}
	defer func() { _ = img.Close() }() // nothing was written through it
	if !img.Complete() {
		return false, nil
	}
	g.pinMounted() // it is mounted; from the switch on, the store does not see it read
	path, err := img.Materialize(ctx)
	if err != nil {
		return true, err
	}
	return true, g.cfg.Mounter.SwitchToLocal(ctx, r.Manifest, path)
}
