package mounts

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/snapshotter"
)

// Has implements snapshotter.Images.
func (m *Mounts) Has(_ context.Context, manifest digest.Digest) (bool, error) {
	return m.cfg.Node.Has(manifest), nil
}

// Prepare implements snapshotter.Images.
func (m *Mounts) Prepare(ctx context.Context, ref string, manifest digest.Digest) ([]digest.Digest, error) {
	p, err := m.cfg.Node.PrepareManifest(ctx, ref, manifest)
	if err != nil {
		return nil, err
	}
	return p.DiffIDs()
}

// Verified implements snapshotter.Images.
func (m *Mounts) Verified(_ context.Context, manifest digest.Digest) (bool, error) {
	return m.cfg.Node.Verified(manifest)
}

// Usage implements snapshotter.Images.
func (m *Mounts) Usage(_ context.Context, c snapshotter.Chain) (int64, error) {
	return m.cfg.Node.LayerUsage(c.Reference, c.Manifest, c.Layers-1)
}

// drainGrace is how long an image that was just unmounted may take to be closed
// by the kernel, before it counts as used.
const drainGrace = 2 * time.Second

// Remove implements snapshotter.Images.
func (m *Mounts) Remove(ctx context.Context, manifest digest.Digest) error {
	ctx, cancel := context.WithTimeout(ctx, drainGrace)
	defer cancel()
	images := []digest.Digest{manifest}
	of := m.cfg.Node.Layers(manifest)
	for n := 1; n < of; n++ {
		images = append(images, imageOf(snapshotter.Chain{Manifest: manifest, Layers: n, Of: of}))
	}
	_ = m.cfg.Mounter.Drain(ctx, images...) // if it is still in use, the node says so
	return m.cfg.Node.Remove(manifest)
}
