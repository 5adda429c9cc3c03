package run

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/wireerr"
)

// hostStart bounds how long a tatami-host may take to open its socket.
const hostStart = 20 * time.Second

// starts is how often a host is started that ends at once.
const starts = 3

// otherHost bounds how long the host that was quicker may take to open it.
const otherHost = 3 * time.Second

// node is a connection to the control socket of tatami-host.
type node struct {
	api.NodeService
	client *ttrpc.Client
	base   *api.NodeStatsResponse // its counters when the connection was made
}

func (n *node) Close() error { return n.client.Close() }

// connectHost uses the tatami-host that listens on o.Socket, or else the one
// that works on o.Root, or else starts one there. A host that was started this
// way ends by itself when nobody is connected any more.
func connectHost(ctx context.Context, o *Options) (*node, error) {
	if o.Socket != "" {
		n, err := dialHost(ctx, o.Socket)
		if err != nil {
			return nil, fmt.Errorf("connect to tatami-host at %s: %w (is it running?)", o.Socket, err)
		}
		return n, nil
	}
	socket := filepath.Join(o.Root, "tatami-host.sock")
	if n, err := dialHost(ctx, socket); err == nil {
		return n, nil
	}
	n, err := startHost(ctx, o, socket)
	for i := 1; errors.Is(err, errEnded) && i < starts; i++ {
		n, err = startHost(ctx, o, socket)
	}
	return n, err
}

// dialHost connects to a host that answers; one that is about to end does not.
func dialHost(ctx context.Context, socket string) (*node, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	cl := ttrpc.NewClient(c, ttrpc.WithUnaryClientInterceptor(wireerr.Client))
	n := &node{NodeService: api.NewNodeClient(cl), client: cl}
	if n.base, err = n.NodeStats(ctx, &api.NodeStatsRequest{}); err != nil {
		cl.Close()
		return nil, err
	}
	return n, nil
}

func startHost(ctx context.Context, o *Options, socket string) (*node, error) {
	bin, err := FindProgram("tatami-host")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Root, 0o700); err != nil {
		return nil, fmt.Errorf("make the node's directory: %w", err)
	}
	logPath := hostLog(o.Root)
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of tatami-host: %w", err)
	}
	defer log.Close()
	// Not bound to ctx: other runs may come to share the process.
	cmd := exec.Command(bin, hostArgs(o)...) //nolint:noctx // it outlives this run on purpose and ends when idle
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", bin, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the process, which ends when idle
	return waitHost(ctx, socket, logPath, ended)
}

// hostLog is where a host that a run started logs.
func hostLog(root string) string { return filepath.Join(root, "tatami-host.log") }

func hostArgs(o *Options) []string {
	args := []string{"--root", o.Root, "--idle-exit"}
	for _, h := range o.PlainHTTP {
		args = append(args, "--plain-http", h)
	}
	return args
}

// errEnded is how a host ends, too, when another one on the same directory is
// just stopping.
var errEnded = errors.New("tatami-host ended at its start")

// waitHost connects as soon as a host listens: the new one, or one that another
// run started at the same time, which makes the new one end.
func waitHost(ctx context.Context, socket, logPath string, ended <-chan error) (*node, error) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.NewTimer(hostStart)
	defer late.Stop()
	cause := fmt.Errorf("tatami-host does not listen on %s after %v: %w", socket, hostStart, errdefs.ErrUnavailable)
	for {
		if n, err := dialHost(ctx, socket); err == nil {
			return n, nil
		}
		select {
		case <-tick.C:
		case err := <-ended:
			cause = fmt.Errorf("%w (%w)", errEnded, orNil(err))
			late.Reset(otherHost)
		case <-late.C:
			return nil, fmt.Errorf("%w: %s", cause, tail(logPath))
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func orNil(err error) error {
	if err == nil {
		return errors.New("exit code 0")
	}
	return err
}

// tail returns the last lines of a log, for an error message.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "\n")
}
