package imagefs

import (
	"encoding/binary"
	"errors"
	"syscall"
)

// maxNow is the largest read in bytes that is answered on the spot: larger ones take so
// long to copy that another processor had better do it.
const maxNow = 64 << 10

// now answers small reads of bytes that are at hand, in the goroutine that receives
// requests. Who reads many small files waits for one after another: each hand-over to a
// goroutine, and to the processor that it wakes, takes several times as long as the copy.
type now struct {
	s   *Server
	buf []byte // reply header and payload
}

func newNow(s *Server) *now { return &now{s: s, buf: make([]byte, outHeaderSize+maxNow)} }

// answer returns false when the request has to be handled as any other.
func (a *now) answer(r request) bool {
	if r.opcode != opRead || r.payload > maxNow {
		return false
	}
	n := a.s.enter(r.node)
	if n == nil {
		return false
	}
	defer n.leave()
	off := r.offset()
	if n.ready == nil || n.aborted.Load() || off < 0 || off >= n.size {
		return false
	}
	reply := a.buf[:outHeaderSize+min(int64(r.payload), n.size-off)]
	if !n.ready.ReadNow(reply[outHeaderSize:], off) {
		return false
	}
	a.s.reads.Add(1)
	a.s.readBytes.Add(int64(len(reply) - outHeaderSize))
	binary.NativeEndian.PutUint32(reply[0:], uint32(len(reply)))
	binary.NativeEndian.PutUint32(reply[4:], 0)
	binary.NativeEndian.PutUint64(reply[8:], r.unique)
	a.s.reply(r, reply, nil)
	return true
}

// reply hands an answer over to the kernel.
func (s *Server) reply(r request, head, payload []byte) {
	if err := s.link.Reply(r.unique, head, payload); err != nil && !errors.Is(err, syscall.ENODEV) {
		s.log.Debug("reply not taken", "opcode", r.opcode, "err", err)
	}
}
