package session

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// journal reads requests on behalf of workers and remembers those that are not
// acknowledged. FORGET is dropped: node ids are never reused, so no worker
// needs to know. INTERRUPT has no answer; it is remembered with its request.
type journal struct {
	fuse *os.File // nonblocking
	log  *slog.Logger

	mu       sync.Mutex
	pending  map[uint64]*pendingRequest // by unique
	order    uint64                     // of the next request
	link     *os.File                   // to the present worker; nil when there is none
	attached chan struct{}              // closed while link is set
	workers  sync.WaitGroup             // goroutines of the present link
}

type pendingRequest struct {
	order     uint64
	msg       []byte
	interrupt []byte // the kernel's INTERRUPT, if it sent one
}

// newJournal reads from a duplicate of the session's descriptor, so that
// closing one leaves the other.
func newJournal(s *Session) (*journal, error) {
	fd, err := unix.FcntlInt(s.fuse.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate /dev/fuse: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare /dev/fuse: %w", err), unix.Close(fd))
	}
	return &journal{
		fuse:     os.NewFile(uintptr(fd), "/dev/fuse"),
		log:      s.log,
		pending:  make(map[uint64]*pendingRequest),
		attached: make(chan struct{}),
	}, nil
}

// recall remembers the requests that an earlier supervisor left unanswered.
func (j *journal) recall(requests [][]byte) error {
	for _, msg := range requests {
		h, err := parseHeader(msg)
		if err != nil {
			return err
		}
		j.record(h, msg)
	}
	return nil
}

// unanswered returns the requests that no worker has acknowledged, each with
// its interrupt behind it, in their order.
func (j *journal) unanswered() [][]byte {
	j.mu.Lock()
	defer j.mu.Unlock()
	var all [][]byte
	for _, p := range j.inOrder() {
		all = append(all, p.msg)
		if p.interrupt != nil {
			all = append(all, p.interrupt)
		}
	}
	return all
}

// inOrder lists what is unanswered as it came. Precondition: mu is held.
func (j *journal) inOrder() []*pendingRequest {
	return slices.SortedFunc(maps.Values(j.pending), func(a, b *pendingRequest) int { return cmp.Compare(a.order, b.order) })
}

// run passes requests on until ctx is done (nil) or the session is over
// (ErrEnded). While there is no worker it does not read: what waits in the
// kernel can still be killed there.
func (j *journal) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = j.fuse.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, BufferSize)
	for {
		select {
		case <-j.ready():
		case <-ctx.Done():
			return nil
		}
		n, err := j.fuse.Read(buf)
		switch {
		case err == nil:
			j.forward(buf[:n])
		case errors.Is(err, unix.ENOENT):
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED):
			return ErrEnded
		default:
			return fmt.Errorf("read /dev/fuse: %w", err)
		}
	}
}

func (j *journal) ready() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.attached
}

// forward records a request and sends it to the present worker. A failure to
// send means that the worker is dying; the next one gets it from pending.
func (j *journal) forward(msg []byte) {
	h, err := parseHeader(msg)
	if err != nil {
		j.log.Warn("unreadable FUSE request dropped", "err", err)
		return
	}
	if h.opcode == opForget || h.opcode == opBatchForget {
		return
	}
	if link := j.record(h, msg); link != nil {
		_, _ = link.Write(msg)
	}
}

// record remembers msg and returns the link to send it on. Both under one
// lock: a request is either seen by the next attach or sent on its link.
func (j *journal) record(h header, msg []byte) *os.File {
	j.mu.Lock()
	defer j.mu.Unlock()
	if h.opcode != opInterrupt {
		j.pending[h.unique] = &pendingRequest{order: j.order, msg: slices.Clone(msg)}
		j.order++
		return j.link
	}
	if len(msg) < inHeaderSize+8 {
		return nil
	}
	p := j.pending[binary.NativeEndian.Uint64(msg[inHeaderSize:])]
	if p == nil { // answered meanwhile
		return nil
	}
	p.interrupt = slices.Clone(msg)
	return j.link
}

// attach hands everything that is unanswered to a new worker and passes on
// from then. The journal owns link until detach.
func (j *journal) attach(link *os.File) {
	j.mu.Lock()
	again := j.inOrder()
	j.link = link
	close(j.attached)
	j.mu.Unlock()

	// Two goroutines: the worker acknowledges while it is still being sent to.
	j.workers.Go(func() { j.sendAgain(link, again) })
	j.workers.Go(func() { j.acknowledge(link) })
}

// sendAgain sends requests and their interrupts, if any. The interrupt is
// looked up after its request was sent: one that comes later is sent behind it
// by forward, and none gets lost between.
func (j *journal) sendAgain(link *os.File, requests []*pendingRequest) {
	for _, p := range requests {
		if _, err := link.Write(p.msg); err != nil {
			return
		}
		j.mu.Lock()
		interrupt := p.interrupt
		j.mu.Unlock()
		if interrupt == nil {
			continue
		}
		if _, err := link.Write(interrupt); err != nil {
			return
		}
	}
}

// acknowledge forgets what the worker says it has answered.
func (j *journal) acknowledge(link *os.File) {
	var ack [8]byte
	for {
		n, err := link.Read(ack[:])
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
				j.log.Warn("read acknowledgements", "err", err)
			}
			return
		}
		if n != len(ack) {
			continue
		}
		j.mu.Lock()
		delete(j.pending, binary.NativeEndian.Uint64(ack[:]))
		j.mu.Unlock()
	}
}

// detach ends the passing on to a worker that is gone.
func (j *journal) detach() {
	j.mu.Lock()
	link := j.link
	if link == nil {
		j.mu.Unlock()
		return
	}
	j.link = nil
	j.attached = make(chan struct{})
	j.mu.Unlock()
	_ = link.Close() // wakes the two goroutines
	j.workers.Wait()
}

func (j *journal) close() error {
	j.detach()
	return j.fuse.Close()
}
