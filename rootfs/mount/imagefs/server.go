package imagefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sync/semaphore"
)

// Link is what requests come from and answers go to: the worker's end of a
// session (session.Link).
type Link interface {
	Receive(buf []byte) (int, error)
	Reply(unique uint64, head, payload []byte) error
	Stop()
}

// Config of a Server. Zero values mean the defaults.
type Config struct {
	Link  Link
	Offer []byte // the kernel's INIT request, as the session recorded it
	// Requests is how many reads run at a time; the others wait. 128.
	Requests int64
	// ReplyBytes bounds the memory of reply buffers. 16 MiB.
	ReplyBytes int64
	// Released is told that the kernel has closed a file. May be nil.
	Released func(node uint64)
	Log      *slog.Logger
}

const (
	defaultRequests   = 128
	defaultReplyBytes = 16 << 20
)

// Stats counts since the start of the process.
type Stats struct {
	Reads, ReadBytes int64 // answered with data
	Failures         int64 // answered with EIO
}

// Server serves files on a session.
type Server struct {
	link       Link
	released   func(uint64)
	log        *slog.Logger
	proto      *fuse.ProtocolServer
	slots      *semaphore.Weighted
	buffers    *buffers
	complaints complaints
	handlers   sync.WaitGroup

	reads, readBytes, failures atomic.Int64

	dying func(pid uint32) bool // tests change it before Serve

	mu    sync.RWMutex
	nodes map[uint64]*node
	names map[string]*node
	calls map[uint64]*call // by unique; requests that run beside the read loop
}

// New prepares a server. Files are added before Serve, or while it runs.
func New(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Requests <= 0 {
		cfg.Requests = defaultRequests
	}
	if cfg.ReplyBytes <= 0 {
		cfg.ReplyBytes = defaultReplyBytes
	}
	s := &Server{
		link: cfg.Link, released: cfg.Released, log: cfg.Log,
		slots:      semaphore.NewWeighted(cfg.Requests),
		buffers:    newBuffers(cfg.ReplyBytes),
		complaints: complaints{log: cfg.Log, now: time.Now, seen: make(map[complaint]*complaintCount)},
		dying:      dying,
		nodes:      make(map[uint64]*node), names: make(map[string]*node), calls: make(map[uint64]*call),
	}
	// The protocol was settled by the supervisor; what is offered here only
	// mirrors it. CAP_PASSTHROUGH must not be answered: see session.
	s.proto = fuse.NewProtocolServer(&filesystem{fuse.NewDefaultRawFileSystem(), s}, &fuse.MountOptions{
		MaxWrite: 1 << 20, MaxBackground: defaultRequests, DisableXAttrs: true, DisableReadDirPlus: true,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH, ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		Logger: log.New(io.Discard, "", 0),
	})
	out := make([]byte, 4096)
	if n, st := s.proto.HandleRequest([][]byte{cfg.Offer}, [][]byte{out}); !st.Ok() || n < outHeaderSize || replyError(out) != 0 {
		return nil, fmt.Errorf("replay the session's INIT: %v, reply error %d", st, replyError(out))
	}
	return s, nil
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	return Stats{Reads: s.reads.Load(), ReadBytes: s.readBytes.Load(), Failures: s.failures.Load()}
}

// Serve answers requests until ctx is done (nil) or the session is over (its
// error). Requests that are under way when ctx ends stay unanswered: the next
// worker gets them.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, s.link.Stop)
	err := s.receive(ctx)
	stop()
	cancel()
	s.handlers.Wait()
	s.buffers.close()
	return err
}

func (s *Server) receive(ctx context.Context) error {
	buf, now := make([]byte, requestSize), newNow(s)
	for {
		n, err := s.link.Receive(buf)
		switch {
		case err == nil:
			s.dispatch(ctx, buf[:n], now)
		case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil:
			return nil
		default:
			return err
		}
	}
}

// dispatch answers on the spot what needs no waiting; releases, and reads that may wait,
// run beside. Receiving goes on at any load, so an interrupt is always seen.
func (s *Server) dispatch(ctx context.Context, msg []byte, now *now) {
	r, err := parseRequest(msg)
	if err != nil {
		s.log.Warn("unreadable FUSE request dropped", "err", err)
		return
	}
	if now.answer(r) {
		return
	}
	switch r.opcode {
	case opInterrupt:
		s.interrupt(r)
	case opRead, opRelease:
		r = r.clone()
		c := s.begin(ctx, r)
		s.handlers.Go(func() { s.run(c, r) })
	default:
		s.answer(ctx, r, make([]byte, smallReply+r.payload))
	}
}
