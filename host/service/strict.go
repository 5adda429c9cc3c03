package service

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// The framing of ttrpc: a header of length and stream, 4 bytes each in big
// endian, of type and flags, a byte each; then the payload.
const (
	headerLen    = 10
	typeAt       = 8
	typeRequest  = 1
	typeResponse = 2
)

// What a guest may send on one connection. Its requests are all small.
const (
	maxFrame      = 64 << 10
	maxUnanswered = 16
)

// defaultStall is how long an answer may take to be written when the
// configuration does not say.
const defaultStall = 30 * time.Second

// strict accepts connections that are closed unless the peer sends requests of
// bounded size and number and reads the answers. The server of ttrpc alone
// panics on a data frame in the stream of a unary request, and keeps one
// goroutine for each request of a client that reads nothing. It serves unary
// methods only.
type strict struct {
	net.Listener
	stall   time.Duration // how long one Write may take
	refused func(error)   // called when a peer breaks the rules
}

// Accept implements net.Listener.
func (l *strict) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &strictConn{Conn: c, l: l}, nil
}

// strictConn is for one reader and one writer at a time.
type strictConn struct {
	net.Conn
	l          *strict
	unanswered atomic.Int32
	in         frames // of the reader
	out        frames // of the writer
}

// Read implements net.Conn. It hands out nothing of a Read that completes the
// header of a refused frame, so that the server never sees one.
func (c *strictConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if bad := c.in.follow(p[:n], c.request); bad != nil {
		c.l.refused(bad)
		_ = c.Conn.Close() // also ends a Write under way; the error that counts is bad
		// To ttrpc only an end of file is a reason to give up a connection.
		return 0, fmt.Errorf("refused: %w: %w", bad, io.ErrUnexpectedEOF)
	}
	return n, err
}

// Write implements net.Conn. An answer counts from before it is written: the
// peer that has read it may send the next request at once.
func (c *strictConn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.l.stall)); err != nil {
		return 0, fmt.Errorf("bound a write: %w", err)
	}
	if err := c.out.follow(p, c.response); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// request checks the header of a frame that the peer sends.
func (c *strictConn) request(size uint32, kind byte) error {
	switch {
	case kind != typeRequest:
		return fmt.Errorf("a frame of type %d, only requests (%d) are taken: %w", kind, typeRequest, errdefs.ErrInvalidArgument)
	case size > maxFrame:
		return fmt.Errorf("a request of %d bytes, at most %d are taken: %w", size, maxFrame, errdefs.ErrInvalidArgument)
	case c.unanswered.Add(1) > maxUnanswered:
		return fmt.Errorf("more than %d requests without their answers: %w", maxUnanswered, errdefs.ErrResourceExhausted)
	}
	return nil
}

// response counts an answer. It never fails.
func (c *strictConn) response(_ uint32, kind byte) error {
	if kind == typeResponse {
		c.unanswered.Add(-1)
	}
	return nil
}

// frames follows one direction of a connection. It keeps headers and skips
// payloads.
type frames struct {
	head [headerLen]byte
	have int    // bytes of head
	left uint32 // bytes of payload to come
}

// follow takes the next bytes, cut anywhere, and calls seen for every header
// that they complete. It ends with the first error.
func (f *frames) follow(p []byte, seen func(size uint32, kind byte) error) error {
	for len(p) > 0 {
		skip := min(uint64(f.left), uint64(len(p)))
		f.left -= uint32(skip)
		p = p[skip:]
		n := copy(f.head[f.have:], p)
		f.have += n
		p = p[n:]
		if f.have < headerLen {
			return nil
		}
		f.have = 0
		f.left = binary.BigEndian.Uint32(f.head[:])
		if err := seen(f.left, f.head[typeAt]); err != nil {
			return err
		}
	}
	return nil
}
