package ociserve

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// listener bounds the connections of another one. golang.org/x/net/netutil does so,
// too, but its connections take no files.
type listener struct {
	net.Listener
	slots chan struct{} // one element for each connection
	done  chan struct{} // closed by Close
	once  sync.Once
}

func limit(l net.Listener, n int) *listener {
	return &listener{Listener: l, slots: make(chan struct{}, n), done: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	out := &conn{Conn: c, release: func() { <-l.slots }}
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil { // or files are copied
			out.raw = raw
		}
	}
	return out, nil
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

// conn is a connection on which the kernel sends parts of files.
type conn struct {
	net.Conn
	raw     syscall.RawConn // nil when it does not; belongs to the connection's goroutine
	release func()
	once    sync.Once
}

// Close implements net.Conn.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.release)
	return err
}

// span is a part of a file as a body. Its end is the end of the reading.
type span struct {
	file   *os.File
	off, n int64 // bytes
}

// Read is for connections that the kernel sends no files on.
func (s *span) Read(p []byte) (int, error) {
	if s.n == 0 {
		return 0, io.EOF
	}
	n, err := s.file.ReadAt(p[:min(int64(len(p)), s.n)], s.off)
	s.advance(n)
	if errors.Is(err, io.EOF) && s.n > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (s *span) advance(n int) {
	s.off += int64(n)
	s.n -= int64(n)
}

// ReadFrom implements io.ReaderFrom, which net/http looks for.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	if s, ok := r.(*span); ok && c.raw != nil {
		n, err := c.send(s)
		if n > 0 || !errors.Is(err, errNoFiles) {
			return n, err
		}
		c.raw = nil
	}
	return io.Copy(struct{ io.Writer }{c.Conn}, r)
}

// errNoFiles says that the kernel does not send this file on this connection.
var errNoFiles = errors.New("no sendfile")

// errGone says that a file was closed before anything of it was sent.
var errGone = errors.New("the file is closed")

// send has the kernel send s. It waits for the connection as Write does, under the
// same deadline.
func (c *conn) send(s *span) (int64, error) {
	file, err := s.file.SyscallConn()
	if err != nil {
		return 0, errGone
	}
	all := s.n
	gone := file.Control(func(from uintptr) { // which holds it open
		var failed error
		err = c.raw.Write(func(to uintptr) bool {
			failed = s.push(int(to), int(from))
			return !errors.Is(failed, unix.EAGAIN)
		})
		if failed != nil && err == nil {
			err = failed
		}
	})
	if gone != nil {
		return 0, errGone
	}
	return all - s.n, err
}

// push sends as much as the connection takes: EAGAIN is when it takes no more.
func (s *span) push(to, from int) error {
	for s.n > 0 {
		off := s.off
		n, err := unix.Sendfile(to, from, &off, int(s.n))
		switch {
		case n > 0:
			s.advance(n)
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return err
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
			return errNoFiles
		case err != nil:
			return fmt.Errorf("send a part of a file: %w", err)
		default:
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}
