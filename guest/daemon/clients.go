package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/protocols/wireerr"
)

// dial connects a ttrpc client.
func dial(ctx context.Context, addr string) (*ttrpc.Client, error) {
	conn, err := vsock.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	return ttrpc.NewClient(conn), nil
}

// hostClient asks the node, on a connection for each question: there are three at most
// for each container.
type hostClient struct{ addr string }

// How long a node that refuses connections is asked again, as one does while it
// is upgraded or has not found this machine yet, and the pause in between.
const (
	hostPatience = 5 * time.Second
	hostPause    = 50 * time.Millisecond
)

func (h hostClient) Describe(ctx context.Context, req *api.DescribeRequest) (*api.DescribeResponse, error) {
	for start := time.Now(); ; {
		resp, err := h.describe(ctx, req)
		if !refused(err) || time.Since(start) > hostPatience {
			return resp, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(hostPause):
		}
	}
}

func (h hostClient) describe(ctx context.Context, req *api.DescribeRequest) (resp *api.DescribeResponse, err error) {
	err = h.ask(ctx, func(host api.HostService) error {
		resp, err = host.Describe(ctx, req)
		return err
	})
	return resp, err
}

// RecordStart is not worth waiting for a node that is away.
func (h hostClient) RecordStart(ctx context.Context, req *api.RecordStartRequest) (resp *api.RecordStartResponse, err error) {
	err = h.ask(ctx, func(host api.HostService) error {
		resp, err = host.RecordStart(ctx, req)
		return err
	})
	return resp, err
}

func (h hostClient) AwaitReady(ctx context.Context, req *api.AwaitReadyRequest) (resp *api.AwaitReadyResponse, err error) {
	err = h.ask(ctx, func(host api.HostService) error {
		resp, err = host.AwaitReady(ctx, req)
		return err
	})
	return resp, err
}

// ask asks once.
func (h hostClient) ask(ctx context.Context, question func(api.HostService) error) error {
	cl, err := dial(ctx, h.addr)
	if err != nil {
		return err
	}
	defer cl.Close()
	return lost(wireerr.FromStatus(question(api.NewHostClient(cl))))
}

// refused says whether nobody took a connection, or it was closed without an
// answer. Where nobody listens, AF_VSOCK and hybrid VMMs reset a connection.
func refused(err error) bool {
	return slices.ContainsFunc([]error{errLost, unix.ECONNREFUSED, unix.ECONNRESET, unix.ENOENT},
		func(e error) bool { return errors.Is(err, e) })
}

// workerClient mounts through the worker, also through one that dies while it
// does: Mount may be repeated.
type workerClient struct{ addr string }

// Between two attempts, and how many there are: a request that kills every
// worker must not do so for ever.
const (
	retryPause  = 100 * time.Millisecond
	maxAttempts = 5
)

func (w workerClient) Mount(ctx context.Context, req *api.MountRequest) (*api.MountResponse, error) {
	var resp *api.MountResponse
	err := w.call(ctx, func(cl *ttrpc.Client) (err error) {
		resp, err = api.NewGuestClient(cl).Mount(ctx, req)
		return err
	})
	return resp, err
}

func (w workerClient) call(ctx context.Context, f func(*ttrpc.Client) error) error {
	for attempt := 1; ; attempt++ {
		cl, err := dial(ctx, w.addr)
		if err == nil {
			err = lost(f(cl))
			_ = cl.Close() // the answer is what counts
		}
		if err == nil || attempt == maxAttempts || !errors.Is(err, errLost) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryPause):
		}
	}
}

// errLost says that the peer died during a call.
var errLost = fmt.Errorf("connection lost: %w", errdefs.ErrUnavailable)

func lost(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("%w: %w", errLost, err)
	}
	return err
}
