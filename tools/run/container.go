package run

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
)

// container is one container in a guest, from Create to Delete.
type container struct {
	id     string
	runner api.RunnerService
	stdin  net.Conn
	output sync.WaitGroup // ends when stdout and stderr are copied
	outErr [2]error
}

// createContainer makes the container and connects its streams.
func createContainer(ctx context.Context, runner api.RunnerService, streams, id string, spec *specs.Spec, o *Options) (*container, error) {
	b, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("encode the runtime configuration: %w", err)
	}
	if _, err := runner.Create(ctx, &api.CreateRequest{Id: id, Spec: b, MountId: id}); err != nil {
		return nil, fmt.Errorf("create the container: %w", err)
	}
	c := &container{id: id, runner: runner}
	if err := c.connect(ctx, streams, o); err != nil {
		return nil, errors.Join(err, c.delete(ctx))
	}
	return c, nil
}

func (c *container) connect(ctx context.Context, streams string, o *Options) error {
	var conns [3]net.Conn
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		conn, err := vsock.Dial(ctx, streams)
		if err == nil {
			conns[i] = conn
			_, err = fmt.Fprintf(conn, "%s %s\n", c.id, name)
		}
		if err != nil {
			closeAll(conns[:])
			return fmt.Errorf("connect %s of the container: %w", name, err)
		}
	}
	c.stdin = conns[0]
	c.output.Go(func() { c.outErr[0] = receive(o.Stdout, conns[1]) })
	c.output.Go(func() { c.outErr[1] = receive(o.Stderr, conns[2]) })
	go send(conns[0], o.Stdin)
	return nil
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
}

// receive copies a stream of the container. Where the reader of our own output
// has gone away the container learns it as it would from a closed pipe.
func receive(w io.Writer, c net.Conn) error {
	defer c.Close()
	if w == nil {
		w = io.Discard
	}
	_, err := io.Copy(w, c)
	if errors.Is(err, syscall.EPIPE) {
		return nil // `tatami run … | head` is no failure of the container
	}
	return err
}

// send copies our input until either side ends. It may stay blocked in a read
// of a terminal after the container has ended; the process ends soon after.
func send(c net.Conn, r io.Reader) {
	if r != nil {
		_, _ = io.Copy(c, r) // the container need not read all of its input
	}
	if hc, ok := c.(interface{ CloseWrite() error }); ok {
		_ = hc.CloseWrite()
		return
	}
	c.Close()
}

// run starts the process, tells started, and returns its exit code.
func (c *container) run(ctx context.Context, started func(context.Context)) (int, error) {
	if _, err := c.runner.Start(ctx, &api.StartRequest{Id: c.id}); err != nil {
		return 0, fmt.Errorf("start the container: %w", err)
	}
	started(ctx)
	r, err := c.runner.Wait(ctx, &api.WaitRequest{Id: c.id})
	if err != nil {
		return 0, fmt.Errorf("wait for the container: %w", err)
	}
	c.output.Wait()
	return int(r.ExitCode), errors.Join(c.outErr[:]...)
}

func (c *container) signal(ctx context.Context, s syscall.Signal) error {
	_, err := c.runner.Signal(ctx, &api.SignalRequest{Id: c.id, Signal: uint32(s)})
	return err
}

func (c *container) delete(ctx context.Context) error {
	if c.stdin != nil {
		c.stdin.Close()
	}
	if _, err := c.runner.Delete(ctx, &api.DeleteRequest{Id: c.id}); err != nil {
		return fmt.Errorf("delete the container: %w", err)
	}
	return nil
}
