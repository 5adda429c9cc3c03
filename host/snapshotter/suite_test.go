package snapshotter

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// serve gives the snapshotter a unix socket and returns containerd's client of
// it.
func serve(s *Snapshotter, socket string) (_ snapshots.Snapshotter, stop func() error, err error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer()
	s.Register(server)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	stop = func() error {
		err := conn.Close()
		server.Stop()
		return errors.Join(err, <-ended)
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), s.cfg.Name), stop, err
}

// containerd's own suite, through its own client.
func TestSuite(t *testing.T) {
	needRoot(t)
	for _, mode := range []Mode{Full, Share} {
		t.Run(string(mode), func(t *testing.T) {
			images := newDirImages(t, t.TempDir())
			testsuite.SnapshotterSuite(t, "tatami", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := Open(ctx, Config{Root: root, Name: "tatami", Mode: mode, Fallback: []Mode{Full}, Images: images})
				if err != nil {
					return nil, nil, err
				}
				client, stop, err := serve(s, filepath.Join(root, "s"))
				return client, func() error { return errors.Join(stop(), s.Close()) }, err
			})
		})
	}
}
