package checknode

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/wireerr"
)

// patience bounds a question to a program or a socket.
const patience = 5 * time.Second

// system is a node that runs.
type system interface {
	// containerdVersion is the line that `containerd --version` prints.
	containerdVersion(ctx context.Context) (string, error)
	// snapshotter says whether a snapshotter answers on a socket.
	snapshotter(ctx context.Context, socket string) error
	// control says whether tatami-host answers on its control socket.
	control(ctx context.Context, socket string) error
}

// running is this machine.
type running struct{}

var _ system = running{}

// programs are containerd: in the search path, or where k3s and RKE2 have it.
var programs = []string{"containerd", "/var/lib/rancher/k3s/data/current/bin/containerd", "/var/lib/rancher/rke2/bin/containerd"}

func (running) containerdVersion(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, p := range programs {
		program, err := exec.LookPath(p)
		if err != nil {
			continue
		}
		out, err := exec.CommandContext(ctx, program, "--version").Output()
		if err != nil {
			return "", fmt.Errorf("ask %s for its version: %w", program, err)
		}
		return string(out), nil
	}
	return "", fmt.Errorf("containerd is not in the search path: %w", errdefs.ErrNotFound)
}

// snapshotter asks for the snapshot with no name. That there is none is an
// answer; that there is no such service is not.
func (running) snapshotter(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	code, err := grpcStatus(ctx, socket, "/containerd.services.snapshots.v1.Snapshots/Stat")
	if err != nil {
		return err
	}
	if code == unimplemented || code == unavailable {
		return fmt.Errorf("no snapshotter is served there (gRPC status %s): %w", code, errdefs.ErrUnavailable)
	}
	return nil
}

// Status codes of gRPC (doc/statuscodes.md of grpc/grpc).
const (
	unimplemented = "12"
	unavailable   = "14"
)

// grpcStatus calls a method with an empty message and returns the status code.
// gRPC is a POST over HTTP/2 with the status in a trailer, or in the header of an
// answer without a message (doc/PROTOCOL-HTTP2.md of grpc/grpc).
func grpcStatus(ctx context.Context, socket, method string) (string, error) {
	t := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	t.Protocols.SetUnencryptedHTTP2(true)
	defer t.CloseIdleConnections()
	empty := make([]byte, 5) // not compressed, no bytes
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://snapshotter"+method, bytes.NewReader(empty))
	if err != nil {
		return "", err
	}
	req.Header = http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxFile)); err != nil {
		return "", err
	}
	code := cmp.Or(resp.Trailer.Get("Grpc-Status"), resp.Header.Get("Grpc-Status"))
	if code == "" {
		return "", fmt.Errorf("no gRPC is spoken there (HTTP status %s): %w", resp.Status, errdefs.ErrUnavailable)
	}
	return code, nil
}

func (running) control(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(wireerr.Client))
	defer client.Close()
	_, err = api.NewNodeClient(client).NodeStats(ctx, &api.NodeStatsRequest{})
	return err
}

// sockets asks tatami-host and the snapshotters that handlers use.
func (n *node) sockets(ctx context.Context, c *containerd, h *host, handlers []Handler) []Finding {
	if n.system == nil || !h.found {
		return nil
	}
	var out []Finding
	if err := n.system.control(ctx, h.control); err != nil {
		return []Finding{{Severity: Error, What: fmt.Sprintf("tatami-host does not answer on %s: %v", h.control, err),
			Add: []string{"systemctl enable --now tatami-host"}}}
	}
	asked := map[string]bool{}
	for _, handler := range handlers {
		at := c.address(handler.Snapshotter)
		if handler.Mode == "" || at == "" || asked[at] {
			continue
		}
		asked[at] = true
		if err := n.system.snapshotter(ctx, at); err != nil {
			out = append(out, Finding{Severity: Error, What: fmt.Sprintf("the snapshotter %q does not answer on %s: %v", handler.Snapshotter, at, err),
				Add: []string{"systemctl restart tatami-host"}})
		}
	}
	return out
}
