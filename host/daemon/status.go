package daemon

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/tatami-containers/tatami/host/class"
	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/service"
	"github.com/tatami-containers/tatami/host/snapshotter"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Lookup implements service.Containers: the snapshotter that has the container
// answers, unless all it has is the lower layers of another image.
func (l *local) Lookup(ctx context.Context, container string) (service.Image, error) {
	for i, s := range l.all {
		c, _, err := s.Lookup(ctx, container)
		if err == nil && c.Whole() {
			return service.Image{Reference: c.Reference, Manifest: c.Manifest, Snapshotter: l.cfg.Snapshotters[i].Name}, nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return service.Image{}, err
		}
	}
	return service.Image{}, fmt.Errorf("no snapshotter has container %.64q: %w", container, errdefs.ErrNotFound)
}

// statusRoom bounds what is told of snapshots, in bytes: ttrpc takes messages of
// 4 MiB (messageLengthMax in its channel.go), and sandboxes are in this one, too.
const statusRoom = 2 << 20

// Status implements service.Local.
func (l *local) Status(ctx context.Context) ([]*api.SnapshotterStatus, error) {
	var out []*api.SnapshotterStatus
	room := statusRoom
	for i, s := range l.all {
		entries, err := s.List(ctx)
		if err != nil {
			return nil, err
		}
		out = append(out, status(l.cfg.Snapshotters[i], entries, l.work.classOf, &room))
	}
	return out, nil
}

// status leaves out what is as it should be and no container's, and what room,
// which shrinks, is too small for.
func status(c config.Snapshotter, entries []snapshotter.Entry, classOf func(key string) (class.Choice, bool), room *int) *api.SnapshotterStatus {
	out := &api.SnapshotterStatus{Name: c.Name, Socket: c.Socket, Mode: c.Mode}
	for _, e := range entries {
		if e.Kind == snapshots.KindCommitted && e.Chain.Manifest != "" {
			out.LazyLayers++
		}
		if e.Kind == snapshots.KindCommitted && e.Reason == "" {
			continue
		}
		one := snapshotStatus(e)
		if c, ok := classOf(e.Key); ok {
			one.Class, one.ClassReason = c.Class, c.Reason
		}
		if *room -= proto.Size(one); *room < 0 {
			out.LeftOut++
			continue
		}
		out.Snapshots = append(out.Snapshots, one)
	}
	return out
}

func snapshotStatus(e snapshotter.Entry) *api.SnapshotStatus {
	kind := map[snapshots.Kind]string{snapshots.KindActive: "active", snapshots.KindView: "view", snapshots.KindCommitted: "committed"}[e.Kind]
	return &api.SnapshotStatus{
		Key: e.Key, Kind: kind, Reference: e.Chain.Reference, ManifestDigest: e.Chain.Manifest.String(),
		Mode: string(e.Mode), Reason: e.Reason,
	}
}
