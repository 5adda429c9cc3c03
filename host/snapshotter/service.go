package snapshotter

import (
	"context"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Register serves the snapshotter as containerd's proxy plugins speak:
// service containerd.services.snapshots.v1.Snapshots.
func (s *Snapshotter) Register(r grpc.ServiceRegistrar) {
	snapshotsapi.RegisterSnapshotsServer(r, service{snapshotservice.FromSnapshotter(s)})
}

// service is containerd's, without its one way to crash.
type service struct{ snapshotsapi.SnapshotsServer }

// Update refuses a message without info, which containerd's service reads all
// the same.
func (s service) Update(ctx context.Context, r *snapshotsapi.UpdateSnapshotRequest) (*snapshotsapi.UpdateSnapshotResponse, error) {
	if r.GetInfo() == nil {
		return nil, status.Error(codes.InvalidArgument, "update snapshot: no info")
	}
	return s.SnapshotsServer.Update(ctx, r)
}
