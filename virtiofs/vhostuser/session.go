package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/rights"
)

// session serves one connection of a front-end. One goroutine runs it; the
// device's queues run beside it.
type session struct {
	cfg     Config
	conn    *net.UnixConn
	mem     memory
	rings   []vring
	breaker breaker

	record     []byte // of chains without an answer, for all queues; may be nil
	recordSize int    // descriptors that each queue has room for

	features uint64 // acknowledged
	proto    uint64 // acknowledged protocol features
	status   uint64 // virtio device status
}

// message is one request with the descriptors that came with it.
type message struct {
	header
	payload []byte
	fds     []int
}

// takeFD gives the next descriptor to the caller.
func (m *message) takeFD() (int, error) {
	if len(m.fds) == 0 {
		return -1, fmt.Errorf("%w: descriptor missing in message %d", ErrProtocol, m.req)
	}
	fd := m.fds[0]
	m.fds = m.fds[1:]
	return fd, nil
}

func (m *message) closeFDs() {
	for _, fd := range m.fds {
		_ = unix.Close(fd) // nobody wanted it
	}
	m.fds = nil
}

func newSession(cfg Config, conn *net.UnixConn) *session {
	s := &session{cfg: cfg, conn: conn, rings: make([]vring, cfg.Queues)}
	s.breaker.report = func(err error) {
		cfg.Log.Error("guest broke the device", "err", err)
		if cfg.Broken != nil {
			cfg.Broken(err)
		}
	}
	return s
}

// run serves until the front-end leaves; then its error is nil.
func (s *session) run() error {
	for {
		m, err := receive(s.conn)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		err = s.answer(m)
		m.closeFDs()
		if err != nil {
			return err
		}
	}
}

// close stops the device and gives everything back. A record of chains stays as it
// is, for a process that takes over.
func (s *session) close() error {
	for i := range s.rings {
		s.pause(i)
		s.rings[i].record = nil
	}
	s.reset()
	for i := range s.rings {
		r := &s.rings[i]
		closeFile(r.kick)
		closeFile(r.call)
		closeFile(r.errFD)
	}
	var err error
	if s.record != nil {
		err = unix.Munmap(s.record)
	}
	return errors.Join(err, s.mem.clear(), s.conn.Close())
}

// receive reads one message of a front-end.
func receive(conn *net.UnixConn) (*message, error) {
	var head [headerLen]byte
	m := &message{}
	if err := receiveHeader(conn, m, head[:]); err != nil {
		m.closeFDs()
		return nil, err
	}
	var err error
	if m.header, err = parseHeader(head); err == nil {
		m.payload = make([]byte, m.size)
		_, err = io.ReadFull(conn, m.payload)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
	}
	if err != nil {
		m.closeFDs()
		return nil, fmt.Errorf("receive message: %w", err)
	}
	return m, nil
}

// receiveHeader reads the header and the descriptors, which come with its first
// byte. io.EOF is the end of the connection.
func receiveHeader(conn *net.UnixConn, m *message, head []byte) error {
	oob := make([]byte, unix.CmsgSpace(4*maxFDs))
	n, oobn, flags, _, err := conn.ReadMsgUnix(head, oob)
	if oobn > 0 {
		fds, ferr := parseFDs(oob[:oobn])
		m.fds, err = fds, errors.Join(err, ferr)
	}
	switch {
	case err != nil:
		return fmt.Errorf("receive message: %w", err)
	case n == 0:
		return io.EOF
	case flags&unix.MSG_CTRUNC != 0:
		return fmt.Errorf("%w: more than %d descriptors in a message", ErrProtocol, maxFDs)
	}
	if _, err := io.ReadFull(conn, head[n:]); err != nil {
		return fmt.Errorf("receive message: %w", io.ErrUnexpectedEOF)
	}
	return nil
}

func parseFDs(oob []byte) ([]int, error) {
	fds, err := rights.Parse(oob)
	if err != nil {
		return fds, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return fds, nil
}

// answer handles m and replies. An error ends the connection: the message broke
// the protocol, or there is no other way to tell the front-end of a failure.
func (s *session) answer(m *message) error {
	reply, err := s.handle(m)
	if errors.Is(err, ErrProtocol) {
		return fmt.Errorf("message %d: %w", m.req, err)
	}
	if reply == nil && m.needReply && s.proto&protoReplyAck != 0 {
		reply = encodeU64(0)
		if err != nil {
			s.cfg.Log.Warn("refused a message of the VMM", "message", m.req, "err", err)
			reply, err = encodeU64(1), nil
		}
	}
	if err != nil {
		return fmt.Errorf("message %d: %w", m.req, err)
	}
	if reply == nil {
		return nil
	}
	if _, err := s.conn.Write(appendReply(m.req, reply)); err != nil {
		return fmt.Errorf("reply to message %d: %w", m.req, err)
	}
	return nil
}
