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

// serve serves a proxy plugin at a unix socket and returns containerd's client of
// it.
func serve(socket string, register func(*grpc.Server)) (_ snapshots.Snapshotter, stop func() error, err error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer()
	register(server)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	stop = func() error {
		err := conn.Close()
		server.Stop()
		return errors.Join(err, <-ended)
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "tatami"), stop, err
}

// listen serves as long as the test runs.
func listen(t testing.TB, register func(*grpc.Server)) snapshots.Snapshotter {
	t.Helper()
	client, stop, err := serve(filepath.Join(t.TempDir(), "s"), register)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return client
}

// containerd's own suite, through its own client.
func TestSuite(t *testing.T) {
	needRoot(t)
	for _, mode := range []Mode{Full, Share} {
		t.Run(string(mode), func(t *testing.T) {
			images := newDirImages(t, t.TempDir())
			// The name of what overlayfs cannot do: rename a directory of a lower.
			testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := Open(ctx, Config{Root: root, Name: "tatami", Mode: mode, Fallback: []Mode{Full}, Images: images})
				if err != nil {
					return nil, nil, err
				}
				client, stop, err := serve(filepath.Join(root, "s"), func(g *grpc.Server) { s.Register(g) })
				return client, func() error { return errors.Join(stop(), s.Close()) }, err
			})
		})
	}
}
