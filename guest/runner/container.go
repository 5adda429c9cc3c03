package runner

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// state of a container.
//
//	state     next      who
//	created   starting  start
//	starting  created   start, when its context ends before the streams are there
//	starting  running   start
//	starting  ended     start, when the process cannot be run
//	running   ended     the goroutine of the process
//	any       deleted   delete
type state int

const (
	created state = iota
	starting
	running
	ended
	deleted
)

func (s state) String() string {
	return [...]string{"created", "starting", "running", "ended", "deleted"}[s]
}

// container is one container from Create to Delete.
type container struct {
	id, dir  string        // immutable
	attached chan struct{} // closed when all streams are there
	gone     chan struct{} // closed by delete: nobody waits for streams any more
	done     chan struct{} // closed when the process has ended and its output is sent

	readers sync.WaitGroup // of connections; end when the connections are closed

	mu    sync.Mutex
	state state                 // protected by mu
	conns [streamCount]net.Conn // protected by mu; each set once
	proc  *process              // protected by mu; set when running
	exit  int32                 // written before done is closed
}

var errDeleted = fmt.Errorf("it was deleted meanwhile: %w", errdefs.ErrNotFound)

func newContainer(id, dir string) *container {
	return &container{
		id: id, dir: dir,
		attached: make(chan struct{}), gone: make(chan struct{}), done: make(chan struct{}),
	}
}

func (c *container) writeBundle(spec []byte) error {
	// What is left of a container whose supervisor died is of no use.
	if err := os.RemoveAll(c.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.dir, "config.json"), spec, 0o600)
}

// attach gives a connection to a stream. Each stream takes one.
func (c *container) attach(s stream, conn net.Conn) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conns[s] != nil || c.state == deleted {
		return fmt.Errorf("%v of container %s is connected already, or the container is deleted: %w", s, c.id, errdefs.ErrAlreadyExists)
	}
	c.conns[s] = conn
	if s != stdin {
		c.readers.Go(func() { drain(conn) })
	}
	for _, p := range c.conns {
		if p == nil {
			return nil
		}
	}
	close(c.attached)
	return nil
}

func (c *container) start(ctx context.Context, runtime, root string) (pid int, err error) {
	if err := c.move(created, starting); err != nil {
		return 0, err
	}
	if err := c.awaitStreams(ctx); err != nil {
		_ = c.move(starting, created) // or it was deleted, and stays so
		return 0, err
	}
	p, err := c.launch(runtime, root)
	if err != nil {
		return 0, err
	}
	return p.started(ctx)
}

// launch starts the process under the lock (a fork, no waiting), so that
// delete sees either no process and a start that will fail, or the process.
func (c *container) launch(runtime, root string) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != starting {
		return nil, errDeleted
	}
	p, err := startProcess(c, runtime, root)
	if err != nil {
		c.state = ended
		return nil, err
	}
	c.proc, c.state = p, running
	go c.finish(p)
	return p, nil
}

func (c *container) awaitStreams(ctx context.Context) error {
	select {
	case <-c.attached:
		return nil
	case <-c.gone:
		return errDeleted
	case <-ctx.Done():
		return fmt.Errorf("wait for stdin, stdout and stderr to be connected: %w", context.Cause(ctx))
	}
}

// finish ends with the process; it is what done, wait and delete wait for.
func (c *container) finish(p *process) {
	c.exit = p.wait()
	c.mu.Lock()
	if c.state == running {
		c.state = ended
	}
	c.mu.Unlock()
	close(c.done)
}

func (c *container) move(from, to state) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != from {
		return fmt.Errorf("it is %v, not %v: %w", c.state, from, errdefs.ErrFailedPrecondition)
	}
	c.state = to
	return nil
}

func (c *container) process() *process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.proc
}

func (c *container) signal(s unix.Signal) error {
	p := c.process()
	if p == nil {
		return fmt.Errorf("it does not run: start it first: %w", errdefs.ErrFailedPrecondition)
	}
	return p.signal(s)
}

func (c *container) wait(ctx context.Context) (int32, error) {
	if c.process() == nil {
		return 0, fmt.Errorf("it was not started: %w", errdefs.ErrFailedPrecondition)
	}
	select {
	case <-c.done:
		return c.exit, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// delete may be called again when its context ended before the process did.
func (c *container) delete(ctx context.Context) error {
	c.mu.Lock()
	p := c.proc
	if c.state != deleted {
		c.state = deleted
		close(c.gone)
	}
	c.mu.Unlock()
	if p != nil {
		if err := c.kill(ctx, p); err != nil {
			return err
		}
	}
	c.closeConns()
	c.readers.Wait()
	if p != nil {
		if err := p.cleanUp(ctx); err != nil {
			return err
		}
	}
	return os.RemoveAll(c.dir)
}

// kill ends the process and waits until it is gone. Its output has nobody to
// go to when the client is slow, so the connections are closed first.
func (c *container) kill(ctx context.Context, p *process) error {
	select {
	case <-c.done:
		return nil
	default:
	}
	_ = p.signal(unix.SIGKILL) // an error means that it has ended
	c.closeConns()
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the killed process: %w", context.Cause(ctx))
	}
}

func (c *container) closeConns() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.conns {
		if p != nil {
			_ = p.Close() // it may be closed already
		}
	}
}
