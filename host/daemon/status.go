package daemon

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/snapshotter"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Lookup implements service.Containers: the snapshotter that has the container
// answers, unless all it has is the lower layers of another image.
func (l *local) Lookup(ctx context.Context, container string) (string, digest.Digest, error) {
	for _, s := range l.all {
		c, _, err := s.Lookup(ctx, container)
		if err == nil && c.Whole() {
			return c.Reference, c.Manifest, nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return "", "", err
		}
	}
	return "", "", fmt.Errorf("no snapshotter has container %.64q: %w", container, errdefs.ErrNotFound)
}

// Status implements service.Local.
func (l *local) Status(ctx context.Context) ([]*api.SnapshotterStatus, error) {
	var out []*api.SnapshotterStatus
	for i, s := range l.all {
		entries, err := s.List(ctx)
		if err != nil {
			return nil, err
		}
		out = append(out, status(l.cfg.Snapshotters[i], entries))
	}
	return out, nil
}

// status leaves out what is as it should be and no container's.
func status(c config.Snapshotter, entries []snapshotter.Entry) *api.SnapshotterStatus {
	out := &api.SnapshotterStatus{Name: c.Name, Socket: c.Socket, Mode: c.Mode}
	for _, e := range entries {
		if e.Kind == snapshots.KindCommitted && e.Chain.Manifest != "" {
			out.LazyLayers++
		}
		if e.Kind == snapshots.KindCommitted && e.Reason == "" {
			continue
		}
		kind := map[snapshots.Kind]string{snapshots.KindActive: "active", snapshots.KindView: "view", snapshots.KindCommitted: "committed"}[e.Kind]
		out.Snapshots = append(out.Snapshots, &api.SnapshotStatus{
			Key: e.Key, Kind: kind, Reference: e.Chain.Reference, ManifestDigest: e.Chain.Manifest.String(),
			Mode: string(e.Mode), Reason: e.Reason,
		})
	}
	return out
}
