package sharedimages

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/rights"
)

// Network is the kind of the socket: unix(7), SOCK_SEQPACKET.
const Network = "unixpacket"

// maxFiles is how many descriptors come with one message.
const maxFiles = 2

// Conn sends and receives messages: one a packet. Several goroutines may send, one
// receives.
type Conn struct {
	c     *net.UnixConn
	raw   rawConn
	stall time.Duration

	mu sync.Mutex // one sends at a time
}

type rawConn interface {
	Write(f func(fd uintptr) bool) error
}

// NewConn takes c over. A peer that takes nothing for as long as stall loses the
// connection.
func NewConn(c *net.UnixConn, stall time.Duration) (*Conn, error) {
	raw, err := c.SyscallConn()
	if err == nil {
		err = c.SetWriteBuffer(2 * MaxPacket)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("use connection: %w", err), c.Close())
	}
	return &Conn{c: c, raw: raw, stall: stall}, nil
}

// Close ends the connection; it may be called any time.
func (c *Conn) Close() error { return c.c.Close() }

// Send sends one message with descriptors, which stay the caller's. After an error
// the connection is closed.
func (c *Conn) Send(h *Header, payload []byte, files ...*os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.c.SetWriteDeadline(time.Now().Add(c.stall))
	if err == nil {
		err = c.send(h, payload, files)
	}
	if err != nil {
		_ = c.c.Close() // ends the receiver; the error that counts is err
		return fmt.Errorf("send message: %w", err)
	}
	return nil
}

// send sends a packet. Precondition: mu is held.
func (c *Conn) send(h *Header, payload []byte, files []*os.File) error {
	if len(payload) > MaxData || len(files) > maxFiles {
		return fmt.Errorf("payload of %d bytes with %d descriptors: %w", len(payload), len(files), errdefs.ErrInvalidArgument)
	}
	var head [headerLen]byte
	h.put(&head)
	var rights []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		rights = unix.UnixRights(fds...)
	}
	var err error
	werr := c.raw.Write(func(fd uintptr) bool {
		_, err = unix.SendmsgBuffers(int(fd), [][]byte{head[:], payload}, rights, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
	return errors.Join(werr, err)
}

// Receive waits for a message, which is put into buf, of MaxPacket bytes. With
// want, descriptors that come along are the caller's, else they are an error: those
// of a hostile peer are not even taken. After an error the connection is closed.
func (c *Conn) Receive(buf []byte, want bool) (h Header, payload []byte, files []*os.File, err error) {
	n, files, err := c.packet(buf, want)
	if err == nil {
		h, payload, err = Decode(buf[:n])
	}
	if err != nil {
		closeAll(files)
		_ = c.c.Close() // the error that counts is err
		return Header{}, nil, nil, fmt.Errorf("receive message: %w", err)
	}
	return h, payload, files, nil
}

// packet receives one. Files may be there even with an error.
func (c *Conn) packet(buf []byte, want bool) (int, []*os.File, error) {
	var space [64]byte
	oob := space[:0]
	if want {
		oob = space[:unix.CmsgSpace(maxFiles*4)]
	}
	n, m, flags, _, err := c.c.ReadMsgUnix(buf, oob)
	if err != nil {
		return 0, nil, err
	}
	files, err := rights.Files(oob[:m], "tatami-host")
	if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("a packet with more bytes or descriptors than are allowed: %w", errdefs.ErrInvalidArgument)
	}
	return n, files, err
}

// closeAll closes what nobody uses.
func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written
	}
}

// Dial connects to tatami-host's socket at path and says hello for a sandbox: the
// connection is then for its images only, whoever has it. Bounded by ctx and a few
// seconds.
func Dial(ctx context.Context, path, sandbox string) (*net.UnixConn, error) {
	c, err := dial(ctx, path, sandbox)
	if err != nil {
		return nil, fmt.Errorf("connect to tatami-host at %s: %w", path, err)
	}
	return c, nil
}

// helloTime bounds the hello.
const helloTime = 5 * time.Second

func dial(ctx context.Context, path, sandbox string) (*net.UnixConn, error) {
	if err := CheckSandbox(sandbox); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	nc, err := new(net.Dialer).DialContext(ctx, Network, path)
	if err != nil {
		return nil, err
	}
	uc := nc.(*net.UnixConn) // of this Network
	c, err := NewConn(uc, helloTime)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if err := c.hello(sandbox); err != nil {
		_ = c.Close() // it may be closed already
		return nil, errors.Join(ctx.Err(), err)
	}
	if !stop() {
		return nil, ctx.Err()
	}
	return uc, nil
}

func (c *Conn) hello(sandbox string) error {
	if err := c.Send(&Header{Op: Hello, N: Version}, []byte(sandbox)); err != nil {
		return err
	}
	h, payload, _, err := c.Receive(make([]byte, MaxPacket), false)
	switch {
	case err != nil:
		return err
	case h.Op != Hello:
		return fmt.Errorf("op %d in answer to hello: %w", h.Op, errdefs.ErrInvalidArgument)
	}
	return h.Err(payload)
}
