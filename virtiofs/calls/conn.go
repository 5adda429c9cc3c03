// Package calls lets the two processes of tatami-virtiofsd call each other: one
// connection, calls in both directions, descriptors in both. The parent has
// privileges and no guest; the child has a guest and no privileges, so either side
// bounds what the other one can make it do: a message has at most maxMessage bytes
// and maxFiles descriptors, not more than maxCalls calls are under way, and messages
// are taken. Who breaks that loses the connection.
//
// On the wire, which is a SOCK_SEQPACKET pair, each packet is one JSON message.
package calls

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	maxMessage = 64 << 10 // bytes
	maxFiles   = 16       // descriptors in one message
	maxCalls   = 256      // under way in one direction

	stallTime = 10 * time.Second // for which the other side may take nothing of a message
)

// Handler answers one call. files are those that came with it and the handler's to
// close; those that it returns are closed when they were sent. The classes of its
// errors (errdefs) reach the caller. Calls run concurrently; ctx ends with the
// connection.
type Handler func(ctx context.Context, op string, args json.RawMessage, files []*os.File) (result any, out []*os.File, err error)

// message is a call, which has an Op, or the answer to one.
type message struct {
	ID    uint64          `json:"id"`
	Op    string          `json:"op,omitempty"`
	Data  json.RawMessage `json:"data,omitempty"` // arguments or result
	Error *failure        `json:"error,omitempty"`
}

// answer is a message with its descriptors.
type answer struct {
	message
	files []*os.File
}

// Conn is one end.
type Conn struct {
	conn   *net.UnixConn
	handle Handler
	ctx    context.Context // done when the connection is lost
	lost   context.CancelCauseFunc
	slots  chan struct{} // one for each call of ours
	stall  time.Duration
	ended  sync.WaitGroup

	writeMu sync.Mutex

	mu      sync.Mutex
	last    uint64                   // id given last
	waiting map[uint64]chan<- answer // our calls
	serving int                      // calls of the other side
}

// ErrLost is the reason of calls that failed because the other process has gone.
var ErrLost = fmt.Errorf("%w: the other process of tatami-virtiofsd has gone", errdefs.ErrUnavailable)

// Pair makes two connected sockets, for New and for a child.
func Pair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make sockets: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "parent"), os.NewFile(uintptr(fds[1]), "child"), nil
}

// New uses the socket f, which it owns. Nothing is received before Start.
func New(f *os.File) (*Conn, error) {
	nc, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("use socket of the other process: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("use socket of the other process: not a unix socket"), nc.Close())
	}
	c := &Conn{conn: uc, stall: stallTime, slots: make(chan struct{}, maxCalls), waiting: map[uint64]chan<- answer{}}
	c.ctx, c.lost = context.WithCancelCause(context.Background())
	return c, nil
}

// Start begins to receive. handle answers the other side's calls; it may be nil for
// an end that is not called.
func (c *Conn) Start(handle Handler) {
	c.handle = handle
	c.ended.Go(c.receive)
}

// Context ends when the other side has gone.
func (c *Conn) Context() context.Context { return c.ctx }

// Close ends the connection, and waits for the handlers, whose contexts end. It may
// be called again.
func (c *Conn) Close() error {
	c.lost(ErrLost)
	err := c.conn.Close()
	c.ended.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Call has the other side carry out op. Its result is decoded into result, which
// may be nil. The files stay the caller's; those that are returned become so.
func (c *Conn) Call(ctx context.Context, op string, args, result any, files ...*os.File) ([]*os.File, error) {
	a, err := c.call(ctx, op, args, files)
	if err != nil {
		return nil, err
	}
	err = a.Error.err()
	if err == nil && result != nil {
		err = json.Unmarshal(a.Data, result)
	}
	if err != nil {
		closeAll(a.files)
		return nil, err
	}
	return a.files, nil
}

func (c *Conn) call(ctx context.Context, op string, args any, files []*os.File) (answer, error) {
	data, err := json.Marshal(args)
	if err != nil {
		return answer{}, fmt.Errorf("encode arguments of %s: %w", op, err)
	}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return answer{}, ctx.Err()
	case <-c.ctx.Done():
		return answer{}, context.Cause(c.ctx)
	}
	id, got := c.begin()
	defer c.forget(id, got)
	if err := c.send(message{ID: id, Op: op, Data: data}, files); err != nil {
		return answer{}, err
	}
	select {
	case a := <-got:
		return a, nil
	case <-ctx.Done():
		return answer{}, ctx.Err()
	case <-c.ctx.Done():
		return answer{}, context.Cause(c.ctx)
	}
}

func (c *Conn) begin() (uint64, chan answer) {
	got := make(chan answer, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last++
	c.waiting[c.last] = got
	return c.last, got
}

// forget ends a call, and takes care of an answer that came too late.
func (c *Conn) forget(id uint64, got <-chan answer) {
	c.mu.Lock()
	delete(c.waiting, id)
	c.mu.Unlock()
	select {
	case a := <-got:
		closeAll(a.files)
	default:
	}
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nobody wanted it
	}
}
