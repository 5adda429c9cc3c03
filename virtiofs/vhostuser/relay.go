package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Backend is a process with a Server, as a Relay sees it.
type Backend struct {
	Conn *net.UnixConn // to the Server; the Relay closes it
	// Ended is closed when the process has ended, or serves no more.
	Ended <-chan struct{}
}

// Relay stands between a VMM and the processes that have its device, one after
// another: when one ends, the next goes on where it was, and the VMM sees nothing
// of it. For that it keeps what the VMM has told (journal) and the memory in which
// the processes note which chains they have not answered (inflight). It touches no
// byte of the guest's memory.
//
// Its devices must be able to carry out a request a second time.
type Relay struct {
	// Start starts the next process, once the one before has ended or is of no use
	// any more. An error ends the Relay: it says that there shall be no other.
	Start func(ctx context.Context) (*Backend, error)
	// Queues is the number of virtqueues of the device, as in Config.
	Queues int

	vmm     *net.UnixConn
	backend *Backend
	state   journal
}

// replyTime is how long a process may take to answer a message; a queue that is
// stopped is drained meanwhile.
const replyTime = 30 * time.Second

// errBackend marks failures that the next process may not have.
var errBackend = errors.New("the process with the device does not answer")

// Run relays until the VMM has left or ctx has ended, and closes vmm.
func (r *Relay) Run(ctx context.Context, vmm *net.UnixConn) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = vmm.CloseRead() }) // ends receive
	defer stop()
	r.vmm = vmm
	r.state = journal{rings: make([]ringState, r.Queues)}
	if r.state.record, err = newRecord(r.Queues); err != nil {
		return errors.Join(err, vmm.Close())
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.restart(ctx); err != nil {
		return err
	}
	messages, failed := make(chan *message), make(chan error, 1)
	go func() { failed <- receiveAll(ctx, vmm, messages) }()
	err = r.loop(ctx, messages, failed)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (r *Relay) loop(ctx context.Context, messages <-chan *message, failed <-chan error) error {
	for {
		var err error
		select {
		case m := <-messages:
			err = r.relay(ctx, m)
			m.closeFDs()
		case <-r.backend.Ended:
			err = r.restart(ctx)
		case err := <-failed:
			return err
		}
		if err != nil {
			return err
		}
	}
}

// receiveAll hands on what the VMM says until it leaves.
func receiveAll(ctx context.Context, vmm *net.UnixConn, messages chan<- *message) error {
	for {
		m, err := receive(vmm)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case messages <- m:
		case <-ctx.Done():
			m.closeFDs()
			return nil
		}
	}
}

func (r *Relay) close() error {
	var err error
	if r.backend != nil {
		err = r.backend.Conn.Close()
	}
	r.state.close()
	return errors.Join(err, r.vmm.Close())
}

// restart has a process with the state that the VMM knows.
func (r *Relay) restart(ctx context.Context) error {
	for {
		if r.backend != nil {
			_ = r.backend.Conn.Close() // of a process that is gone
			r.backend = nil
		}
		b, err := r.Start(ctx)
		if err != nil {
			return err
		}
		r.backend = b
		if err = r.replay(); !errors.Is(err, errBackend) {
			return err
		}
	}
}

// replay tells a new process all of the state. It has taken it when it answers the
// last message.
func (r *Relay) replay() error {
	for _, m := range r.state.messages() {
		if err := r.tell(m); err != nil {
			return err
		}
	}
	_, err := r.ask(&message{header: header{req: getFeatures}})
	return err
}

// relay carries out one message of the VMM, and remembers what it leaves behind.
func (r *Relay) relay(ctx context.Context, m *message) error {
	reply, err := r.exchange(ctx, m)
	if err != nil {
		return err
	}
	if reply != nil {
		if _, err := r.vmm.Write(appendReply(m.req, reply)); err != nil {
			return fmt.Errorf("reply to message %d: %w", m.req, err)
		}
	}
	return nil
}

// exchange has a process carry out m, however many that takes.
func (r *Relay) exchange(ctx context.Context, m *message) (reply []byte, err error) {
	if !r.state.answered(m) {
		told := r.tell(m)
		if err := r.state.apply(m, nil); err != nil {
			return nil, err
		}
		if errors.Is(told, errBackend) {
			return nil, r.restart(ctx) // the state has it
		}
		return nil, told
	}
	for {
		if reply, err = r.ask(m); !errors.Is(err, errBackend) {
			break
		}
		if err := r.restart(ctx); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	return reply, r.state.apply(m, reply)
}

// tell sends m to the process. The descriptors stay the caller's.
func (r *Relay) tell(m *message) error {
	b := appendReply(m.req, m.payload)
	b[4] = flagVersion
	if m.needReply {
		b[4] |= flagNeedReply
	}
	var oob []byte
	if len(m.fds) > 0 {
		oob = unix.UnixRights(m.fds...)
	}
	err := r.backend.Conn.SetWriteDeadline(time.Now().Add(replyTime))
	if err == nil {
		_, _, err = r.backend.Conn.WriteMsgUnix(b, oob, nil)
	}
	if err != nil {
		return fmt.Errorf("%w: message %d: %w", errBackend, m.req, err)
	}
	return nil
}

// ask sends m and waits for the payload of the reply.
func (r *Relay) ask(m *message) ([]byte, error) {
	if err := r.tell(m); err != nil {
		return nil, err
	}
	c := r.backend.Conn
	err := c.SetReadDeadline(time.Now().Add(replyTime))
	var p []byte
	if err == nil {
		p, err = readReply(c, m.req)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: reply to message %d: %w", errBackend, m.req, err)
	}
	return p, nil
}

// readReply reads what a process answers, which is not trusted.
func readReply(c io.Reader, req request) ([]byte, error) {
	var b [headerLen]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return nil, err
	}
	if b[4]&flagReply == 0 {
		return nil, fmt.Errorf("%w: flags %#x of a reply", ErrProtocol, b[4])
	}
	b[4] &^= flagReply
	h, err := parseHeader(b)
	if err == nil && h.req != req {
		err = fmt.Errorf("%w: reply to message %d", ErrProtocol, h.req)
	}
	if err != nil {
		return nil, err
	}
	p := make([]byte, h.size)
	_, err = io.ReadFull(c, p)
	return p, err
}
