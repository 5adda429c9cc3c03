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
type snapshotter struct {
	snapshots.Snapshotter
	t *testing.T
}

func (h *host) snapshotter(name string) *snapshotter {
	h.t.Helper()
	conn, err := grpc.NewClient("unix://"+h.state()+"/"+name+".sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close() }) // the host may have ended
	return &snapshotter{proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), h.t}
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
func (s *snapshotter) remove(ctx context.Context, id string) {
	s.t.Helper()
	if err := s.Remove(ctx, containerOf+id); err != nil {
		s.t.Errorf("remove the snapshot of %s: %v", id, err)
	}
}

// removeImages removes what no container uses.
func (s *snapshotter) removeImages(ctx context.Context) {
	s.t.Helper()
	var names []string
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	})
	for _, name := range names {
		err = errors.Join(err, s.Remove(ctx, name))
	}
	if err != nil {
		s.t.Error(err)
	}
}
