package katavm

import (
	"context"
	"errors"
	"fmt"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/katavm/shim"
)

// Snapshotters of the node.
const (
	guestMode   = "tatami-guest"
	diskMode    = "tatami-disk"   // block, writes go to an ext4 disk
	memoryMode  = "tatami-memory" // block, writes stay in the guest's memory
	upperSize   = "64M"
	firstOf     = "k8s.io/1/"
	containerOf = "k8s.io/2/"
)

// snapshotter is containerd's client of one of the node's snapshotters. It names
// snapshots as containerd's metadata store does: namespace, number, name.
type snapshotter struct{ snapshots.Snapshotter }

func (h *host) snapshotter(t *testing.T, name string) *snapshotter {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+h.state()+"/"+name+".sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // the host may have ended
	return &snapshotter{proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name)}
}

// pull does what containerd's unpacker does for the image's layer: the node says
// that it has it. It returns the name of the committed snapshot.
func (s *snapshotter) pull(ctx context.Context, img testImage) (string, error) {
	_, err := s.Prepare(ctx, firstOf+"extract-1 "+img.diffID.String(), "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef:             img.diffID.String(),
		snapshotters.TargetRefLabel:            img.ref,
		snapshotters.TargetManifestDigestLabel: img.manifest.String(),
		snapshotters.TargetLayerDigestLabel:    img.layer.String(),
		snapshotters.TargetImageLayersLabel:    img.layer.String(),
	}))
	if !errdefs.IsAlreadyExists(err) {
		return "", fmt.Errorf("prepare the layer of %s: %w, want that it is there", img.ref, err)
	}
	var name string
	err = s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		name = info.Name
		return nil
	}, fmt.Sprintf("labels.%q==%s", snapshots.LabelSnapshotRef, img.diffID))
	if name == "" {
		err = errors.Join(err, errors.New("no snapshot of the layer"))
	}
	return name, err
}

// prepare returns the mount list of a container.
func (s *snapshotter) prepare(ctx context.Context, id string, img testImage) ([]shim.Mount, error) {
	parent, err := s.pull(ctx, img)
	if err != nil {
		return nil, err
	}
	mounts, err := s.Prepare(ctx, containerOf+id, parent)
	if err != nil {
		return nil, err
	}
	var list []shim.Mount
	for _, m := range mounts {
		list = append(list, shim.Mount{Type: m.Type, Source: m.Source, Options: m.Options})
	}
	return list, nil
}

// remove removes the snapshot of a container.
func (s *snapshotter) remove(t *testing.T, id string) {
	t.Helper()
	if err := s.Remove(t.Context(), containerOf+id); err != nil {
		t.Errorf("remove the snapshot of %s: %v", id, err)
	}
}

// removeImages removes what no container uses.
func (s *snapshotter) removeImages(t *testing.T) {
	t.Helper()
	var names []string
	err := s.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	})
	for _, name := range names {
		err = errors.Join(err, s.Remove(t.Context(), name))
	}
	if err != nil {
		t.Error(err)
	}
}

// collect waits until the node has no image any more. It asks for a Cleanup, as
// containerd does after each garbage collection: an image that a sandbox used a
// moment ago goes with one of those.
func (s *snapshotter) collect(t *testing.T, h *host) {
	t.Helper()
	cleaner, ok := s.Snapshotter.(snapshots.Cleaner)
	if !ok {
		t.Fatal("the snapshotter has no Cleanup")
	}
	waitFor(t, func() error {
		if err := cleaner.Cleanup(t.Context()); err != nil {
			return err
		}
		stats, err := h.NodeStats(t.Context(), &api.NodeStatsRequest{})
		if err == nil && stats.Images != 0 {
			err = fmt.Errorf("the node has %d images still", stats.Images)
		}
		return err
	})
}
