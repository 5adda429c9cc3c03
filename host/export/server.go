// Package export gives the images of sandboxes to their virtio-fs devices
// (tatami-virtiofsd) over a unix socket; the messages are those of package
// sharedimages. What the node has, a device reads by itself, from descriptors that
// it gets; for what is missing it asks.
//
// A device is exposed to a guest, so it is assumed hostile, too: a connection
// reads what its sandbox was granted and nothing else, and what it can hold of the
// node is bounded (connections, images open, requests, and how long it may leave
// an answer untouched). Which sandbox a connection is for is said before a device
// has it, by a process of the machine's administrator; the socket takes no other.
//
// Lock order: Server.mu, conn.mu; nothing is waited for under them.
package export

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Image is an image that a connection has open.
type Image interface {
	// Describe says where its parts are.
	Describe() sharedimages.Opened
	// Boot is its bootstrap, read-only and the caller's to close.
	Boot() (*os.File, error)
	// Share is segment k, which begins at off of data. Both files are read-only and
	// the caller's to close.
	Share(k int) (state, data *os.File, off int64, err error)
	// ReadAt is as of io.ReaderAt, and fetches what is missing.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Flow is for whom it is read at present.
	Flow() *sched.Flow
	// Close gives it back. It is called once, when nothing is read any more.
	Close()
}

// Config of a Server.
type Config struct {
	// Open opens an image for a sandbox; ErrNotFound when that was not granted it.
	Open func(sandbox string, manifest digest.Digest) (Image, error)
	// Left is told that a sandbox has no connection any more; inOrder when the last
	// one was ended and not lost. May be nil.
	Left func(sandbox string, inOrder bool)
	// Requests is how many reads of a sandbox are at work at a time, others wait;
	// 16 when 0. Each takes sharedimages.MaxData bytes of memory.
	Requests int
	// Stall is how long a device may take nothing of an answer; 30 s when 0.
	Stall time.Duration
	// Queue is what is waited for before bytes are sent; nil lets them pass.
	Queue *sched.Slots
	Log   *slog.Logger
}

// What a peer can make this process hold.
const (
	maxConns      = 4096
	maxBoxConns   = 4 // of one sandbox: one, and those that it was not noticed yet that they are dead
	maxOpens      = 1024
	maxRequest    = 1 << 10 // bytes of a message of a device: a header with an id or a digest
	helloTime     = 10 * time.Second
	acceptBackoff = 100 * time.Millisecond
)

// Server serves the devices of all sandboxes.
type Server struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // connections

	mu     sync.Mutex
	closed bool                      // protected by mu
	count  int                       // of connections, also before their hello; protected by mu
	boxes  map[string]*box           // those with connections; protected by mu
	socket map[*net.UnixConn]bool    // protected by mu
	listen map[net.Listener]struct{} // protected by mu
}

// box is what the connections of one sandbox share.
type box struct {
	slots chan struct{}  // one element for each read at work
	conns map[*conn]bool // protected by Server.mu
}

// New returns a Server. It serves nothing until Serve is called.
func New(cfg Config) *Server {
	if cfg.Requests == 0 {
		cfg.Requests = 16
	}
	if cfg.Stall == 0 {
		cfg.Stall = 30 * time.Second
	}
	if cfg.Left == nil {
		cfg.Left = func(string, bool) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, boxes: map[string]*box{}, socket: map[*net.UnixConn]bool{}, listen: map[net.Listener]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve takes connections of l, whose network is sharedimages.Network, until
// Close, and closes it.
func (s *Server) Serve(l *net.UnixListener) error {
	defer l.Close()
	if !s.listens(l) {
		return nil
	}
	for {
		c, err := l.AcceptUnix()
		switch {
		case s.ctx.Err() != nil:
			if err == nil {
				_ = c.Close() // nothing was said on it
			}
			return nil
		case errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED):
			s.cfg.Log.Warn("a virtio-fs device cannot connect for now", "error", err)
			s.pause(acceptBackoff)
		case err != nil:
			return fmt.Errorf("accept virtio-fs devices: %w", err)
		default:
			s.take(c)
		}
	}
}

func (s *Server) listens(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listen[l] = struct{}{}
	return !s.closed
}

func (s *Server) pause(d time.Duration) {
	select {
	case <-time.After(d):
	case <-s.ctx.Done():
	}
}

// take serves a connection beside.
func (s *Server) take(c *net.UnixConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.count >= maxConns {
		_ = c.Close() // nothing was said on it
		return
	}
	s.count++
	s.socket[c] = true
	s.wg.Go(func() {
		err := s.serve(c)
		_ = c.Close() // it may be closed already
		s.mu.Lock()
		defer s.mu.Unlock()
		s.count--
		delete(s.socket, c)
		if err != nil && s.ctx.Err() == nil {
			s.cfg.Log.Warn("a connection for virtio-fs is refused", "error", err)
		}
	})
}

// serve is one connection. The error is of one that never became a sandbox's.
func (s *Server) serve(uc *net.UnixConn) error {
	if err := checkPeer(uc); err != nil {
		return err
	}
	wire, err := sharedimages.NewConn(uc, s.cfg.Stall)
	if err != nil {
		return err
	}
	if err := uc.SetReadDeadline(time.Now().Add(helloTime)); err != nil {
		return err
	}
	buf := make([]byte, maxRequest)
	sandbox, id, err := greeting(wire, buf)
	if err != nil {
		return err
	}
	if err := uc.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	c := &conn{s: s, wire: wire, sandbox: sandbox, log: s.cfg.Log.With("sandbox", sandbox),
		room: make(chan struct{}, sharedimages.MaxCalls), calls: map[uint32]context.CancelFunc{}, opens: map[uint32]*open{}}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	defer c.cancel()
	answer := sharedimages.Header{Op: sharedimages.Hello, ID: id, N: sharedimages.Version}
	if err := s.enter(c); err != nil {
		return errors.Join(err, wire.Send(&answer, answer.Fail(err)))
	}
	err = wire.Send(&answer, nil)
	if err == nil {
		c.log.Info("virtio-fs device is connected")
		err = c.run(buf)
	}
	c.end()
	s.leave(c, err)
	return nil
}

// checkPeer refuses who is neither the machine's administrator nor this user.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("ask who connects: %w", err)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d (pid %d) connects: %w", cred.Uid, cred.Pid, errdefs.ErrPermissionDenied)
	}
	return nil
}

// greeting is the first message.
func greeting(wire *sharedimages.Conn, buf []byte) (sandbox string, id uint32, err error) {
	h, payload, _, err := wire.Receive(buf, false)
	if err == nil && h.Op != sharedimages.Hello {
		err = fmt.Errorf("message %d before hello: %w", h.Op, errdefs.ErrInvalidArgument)
	}
	if err == nil {
		err = sharedimages.CheckSandbox(string(payload))
	}
	if err != nil {
		return "", 0, err
	}
	if h.N != sharedimages.Version {
		err = fmt.Errorf("the device speaks version %d, tatami-host %d; install the same version of both: %w", h.N, sharedimages.Version, errdefs.ErrNotImplemented)
		h.N = sharedimages.Version
		return "", 0, errors.Join(err, wire.Send(&h, h.Fail(err)))
	}
	return string(payload), h.ID, nil
}

// enter makes a connection one of its sandbox.
func (s *Server) enter(c *conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.boxes[c.sandbox]
	if b == nil {
		b = &box{slots: make(chan struct{}, s.cfg.Requests), conns: map[*conn]bool{}}
	}
	if len(b.conns) >= maxBoxConns {
		return fmt.Errorf("sandbox %s has %d connections: %w", c.sandbox, maxBoxConns, errdefs.ErrResourceExhausted)
	}
	s.boxes[c.sandbox] = b
	b.conns[c] = true
	c.slots = b.slots
	return nil
}

// leave forgets a connection, which ended with err.
func (s *Server) leave(c *conn, err error) {
	s.mu.Lock()
	b := s.boxes[c.sandbox]
	delete(b.conns, c)
	last := len(b.conns) == 0
	if last {
		delete(s.boxes, c.sandbox)
	}
	s.mu.Unlock()
	switch {
	case s.ctx.Err() != nil:
		return
	case err == nil:
		c.log.Info("virtio-fs device has left")
	default:
		c.log.Warn("virtio-fs device is lost; its guest gets nothing more of what is missing here", "error", err)
	}
	if last {
		s.cfg.Left(c.sandbox, err == nil)
	}
}

// Connected says whether a sandbox has a connection.
func (s *Server) Connected(sandbox string) bool { return len(s.conns(sandbox)) > 0 }

func (s *Server) conns(sandbox string) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.boxes[sandbox]
	if b == nil {
		return nil
	}
	return slices.Collect(maps.Keys(b.conns))
}

// Gone tells a sandbox's devices that an image is not granted any more. Those who
// have it open may read it until they close it.
func (s *Server) Gone(sandbox string, manifest digest.Digest) {
	for _, c := range s.conns(sandbox) {
		c.gone(manifest)
	}
}

// Drop closes all images that a sandbox has open, and returns when nothing of them
// is read any more. Its connections stay.
func (s *Server) Drop(sandbox string) {
	for _, c := range s.conns(sandbox) {
		c.drop()
	}
}

// Close ends all connections and Serve. When it returns, no image is open. It is
// idempotent.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.cancel()
	for c := range s.socket {
		_ = c.Close() // ends its reader
	}
	for l := range s.listen {
		_ = l.Close() // ends Serve
	}
	s.mu.Unlock()
	s.wg.Wait()
}
