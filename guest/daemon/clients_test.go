package daemon

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

type describer struct{}

func (describer) Describe(context.Context, *api.DescribeRequest) (*api.DescribeResponse, error) {
	return &api.DescribeResponse{Reference: sampleRef}, nil
}

func (describer) AwaitReady(context.Context, *api.AwaitReadyRequest) (*api.AwaitReadyResponse, error) {
	return &api.AwaitReadyResponse{}, nil
}

func (describer) RecordStart(context.Context, *api.RecordStartRequest) (*api.RecordStartResponse, error) {
	return &api.RecordStartResponse{}, nil
}

// A question outlives a node that is not there yet, and one that closes the
// connection; the guest does not go elsewhere for that.
func TestDescribeWaitsForNode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "host")
	h := hostClient{"unix:" + path}
	answered := make(chan error, 1)
	go func() {
		_, err := h.Describe(t.Context(), &api.DescribeRequest{ContainerId: "c1"})
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("nobody is there, and the answer is %v", err)
	case <-time.After(2 * hostPause):
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close() // as for a machine that is nobody's
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	api.RegisterHostService(srv, describer{})
	go func() { _ = srv.Serve(t.Context(), l) }() // ends with Close
	defer srv.Close()
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// Who asks can go away.
func TestDescribeCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := hostClient{"unix:" + filepath.Join(t.TempDir(), "host")}.Describe(ctx, &api.DescribeRequest{})
	if err == nil || errdefs.IsNotFound(err) {
		t.Errorf("answered %v", err)
	}
}
