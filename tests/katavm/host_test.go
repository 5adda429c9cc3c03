package katavm

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/katavm/shim"
)

// host is a running tatami-host.
type host struct {
	api.NodeService
	t    *testing.T
	root string
}

// startHost runs a tatami-host until the test ends and connects to it.
func startHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, root: tempDir(t)}
	log, err := os.Create(filepath.Join(h.root, "tatami-host.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "tatami-host"), "--root", h.root)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Wait(); err != nil && t.Context().Err() == nil {
			t.Errorf("tatami-host: %v", err)
		}
		if t.Failed() {
			b, _ := os.ReadFile(log.Name()) // for people
			t.Logf("tatami-host:\n%s", b)
		}
	})
	h.connect()
	return h
}

func (h *host) connect() {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", filepath.Join(h.root, "tatami-host.sock")) //nolint:noctx // a unix socket answers at once
		if err == nil {
			client := ttrpc.NewClient(conn)
			h.t.Cleanup(func() { _ = client.Close() }) // the host may have ended
			h.NodeService = api.NewNodeClient(client)
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("tatami-host does not listen: %v", err)
		}
	}
}

// attach serves a sandbox.
func (h *host) attach(ctx context.Context, id string, s *shim.Sandbox) {
	h.t.Helper()
	_, err := h.Attach(ctx, &api.AttachRequest{Sandbox: id, Cid: s.CID(),
		HostAddress: s.HostAddress(vsock.HostPort), RelayAddress: s.HostAddress(vsock.RelayPort)})
	if err != nil {
		h.t.Fatal(err)
	}
}

// add lets a sandbox have a container.
func (h *host) add(ctx context.Context, sandbox, id, ref string) {
	h.t.Helper()
	if _, err := h.AddContainer(ctx, &api.AddContainerRequest{Sandbox: sandbox, ContainerId: id, Reference: ref}); err != nil {
		h.t.Fatal(err)
	}
}

// relayed is how many bytes sandboxes have got.
func (h *host) relayed(ctx context.Context) int64 {
	h.t.Helper()
	stats, err := h.NodeStats(ctx, &api.NodeStatsRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	return stats.RelayBytes
}
