package imagefs

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
)

// What of the wire protocol (include/uapi/linux/fuse.h) is needed to route a
// request; the protocol server takes the rest apart.
const (
	inHeaderSize  = 40
	outHeaderSize = 16
	requestSize   = 8192 // session.BufferSize
	smallReply    = 4096 // more than any reply without a payload

	opRead      = 15
	opRelease   = 18
	opGetxattr  = 22
	opListxattr = 23
	opReaddir   = 28
	opInterrupt = 36
)

// maxPayload bounds what a request may ask for.
const maxPayload = 1 << 20

// request is one message of the kernel.
type request struct {
	opcode       uint32
	unique, node uint64
	pid          uint32 // thread, as this process's /proc has it; 0 if it is not there
	payload      int    // bytes of data that the reply may hold
	msg          []byte
}

func parseRequest(msg []byte) (request, error) {
	if len(msg) < inHeaderSize {
		return request{}, fmt.Errorf("request of %d bytes is shorter than its header: %w", len(msg), errdefs.ErrDataLoss)
	}
	r := request{
		opcode: binary.NativeEndian.Uint32(msg[4:]),
		unique: binary.NativeEndian.Uint64(msg[8:]),
		node:   binary.NativeEndian.Uint64(msg[16:]),
		pid:    binary.NativeEndian.Uint32(msg[32:]),
		msg:    msg,
	}
	// Where fuse_read_in and fuse_getxattr_in keep their size.
	at := 0
	switch r.opcode {
	case opRead, opReaddir:
		at = inHeaderSize + 16
	case opGetxattr, opListxattr, opInterrupt:
		at = inHeaderSize
	default:
		return r, nil
	}
	if len(msg) < at+8 {
		return request{}, fmt.Errorf("request of opcode %d with %d bytes is too short: %w", r.opcode, len(msg), errdefs.ErrDataLoss)
	}
	if r.opcode == opInterrupt {
		return r, nil
	}
	size := binary.NativeEndian.Uint32(msg[at:])
	if size > maxPayload {
		return request{}, fmt.Errorf("request of opcode %d asks for %d bytes: %w", r.opcode, size, errdefs.ErrDataLoss)
	}
	r.payload = int(size)
	return r, nil
}

// target is the unique of the request that an INTERRUPT is about.
func (r request) target() uint64 { return binary.NativeEndian.Uint64(r.msg[inHeaderSize:]) }

// offset is where a READ begins: fuse_read_in has a file handle before it.
func (r request) offset() int64 { return int64(binary.NativeEndian.Uint64(r.msg[inHeaderSize+8:])) }

func (r request) clone() request {
	r.msg = slices.Clone(r.msg)
	return r
}

// call is a request that runs beside the read loop and can be interrupted.
type call struct {
	node    uint64
	pid     uint32          // of the thread that waits
	serving context.Context // done: the server stops, and does not answer failures
	ctx     context.Context
	cancel  context.CancelFunc
}

func (s *Server) begin(serving context.Context, r request) *call {
	c := &call{node: r.node, pid: r.pid, serving: serving}
	c.ctx, c.cancel = context.WithCancel(serving)
	s.mu.Lock()
	s.calls[r.unique] = c
	s.mu.Unlock()
	return c
}

func (s *Server) finish(unique uint64, c *call) {
	c.cancel()
	s.mu.Lock()
	delete(s.calls, unique)
	s.mu.Unlock()
}

// callContext is the context of a request that is being handled.
func (s *Server) callContext(unique uint64) context.Context {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if c := s.calls[unique]; c != nil {
		return c.ctx
	}
	return context.Background()
}

// interrupt cancels a request of a process that is being killed. For other
// signals (timers, the Go runtime's own) the request goes on: EROFS would hand
// the EINTR to stat, and make a SIGBUS of it in a page fault. A request that is
// not known has been answered: requests are registered in the order in which the
// kernel sends them.
func (s *Server) interrupt(r request) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if c := s.calls[r.target()]; c != nil && s.dying(c.pid) {
		c.cancel()
	}
}

func (s *Server) run(c *call, r request) {
	defer s.finish(r.unique, c)
	if r.opcode != opRead {
		s.answer(c.serving, r, make([]byte, smallReply))
		return
	}
	if err := s.slots.Acquire(c.ctx, 1); err != nil {
		s.refuse(c, r, syscall.EINTR)
		return
	}
	defer s.slots.Release(1)
	buf, err := s.buffers.get(c.ctx, r.payload)
	if err != nil {
		s.log.Debug("no reply buffer", "err", err)
		s.refuse(c, r, refusal(c.ctx))
		return
	}
	defer s.buffers.put(buf)
	// The payload follows the header in the reply, so it must start a slice of
	// its own to be read into in place.
	head := make([]byte, outHeaderSize)
	n, _ := s.proto.HandleRequest([][]byte{r.msg}, [][]byte{head, buf})
	s.send(c.serving, r, n, head, buf)
}

func refusal(ctx context.Context) syscall.Errno {
	if ctx.Err() != nil {
		return syscall.EINTR
	}
	return syscall.ENOMEM
}

// refuse answers without asking the filesystem.
func (s *Server) refuse(c *call, r request, errno syscall.Errno) {
	head := make([]byte, outHeaderSize)
	binary.NativeEndian.PutUint32(head[0:], outHeaderSize)
	binary.NativeEndian.PutUint32(head[4:], uint32(-int32(errno)))
	binary.NativeEndian.PutUint64(head[8:], r.unique)
	s.send(c.serving, r, outHeaderSize, head, nil)
}

// answer handles a request whose reply is small.
func (s *Server) answer(serving context.Context, r request, out []byte) {
	n, _ := s.proto.HandleRequest([][]byte{r.msg}, [][]byte{out})
	s.send(serving, r, n, out[:min(n, len(out))], nil)
}

// send gives a reply of n bytes to the kernel. A failure that comes from the
// server's own end is kept back: the next worker answers that request.
func (s *Server) send(serving context.Context, r request, n int, head, payload []byte) {
	if n < outHeaderSize {
		return // the protocol wants no reply
	}
	if serving.Err() != nil && replyError(head) != 0 {
		return
	}
	s.reply(r, head, payload[:min(n-len(head), len(payload))])
}

func replyError(reply []byte) int32 { return int32(binary.NativeEndian.Uint32(reply[4:])) }
