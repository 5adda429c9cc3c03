// Package ociserve is what registries of the node have in common, the relay of a
// sandbox and the mirror: the read side of the OCI distribution API as an HTTP
// server for clients that may be hostile. What they can hold of the node is bounded:
// connections, requests at a time, one buffer for each, and the time for which
// they may leave an answer untouched. An answer that cannot be completed is broken
// off, never ended early as if it were whole.
//
// It knows nothing of images and of who may read what.
package ociserve

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Config of a Server.
type Config struct {
	// Answer answers one request. A *Failure is sent as it is, of other errors only
	// the class; after the first byte of an answer an error is marked by Broken.
	Answer func(w http.ResponseWriter, req *http.Request) error
	// Requests bounds those served at a time, others wait; 16 when 0.
	Requests int
	// Stall is how long a client may take nothing of an answer; 30 s when 0.
	Stall time.Duration
	// Sent counts body bytes, if it is there.
	Sent *atomic.Int64
	// Queue is what each piece of a body waits for before it is sent, as the work of the
	// request's context; nil lets it pass.
	Queue *sched.Slots
	Log   *slog.Logger
}

// piece is how many bytes are read and written at a time, and the memory that
// one request takes.
const piece = 256 << 10

// pieces are the buffers (*[piece]byte) of all servers: with one pool for each, every
// sandbox of a node would keep as many as it ever needed at a time.
var pieces = sync.Pool{New: func() any { return new([piece]byte) }}

// Limits of the HTTP server, for a client that opens connections and says
// nothing or too much.
const (
	headerBytes   = 16 << 10
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	connsPerSlot  = 4 // connections for each request that is served at a time
)

// Server serves one kind of clients.
type Server struct {
	cfg    Config
	slots  chan struct{} // one element for each request being served
	later  chan struct{} // one element for each of them that nobody waits for
	server *http.Server
	once   sync.Once // of Shutdown

	complaints complaints
}

// New returns a Server. It serves nothing until Serve is called.
func New(cfg Config) *Server {
	if cfg.Requests == 0 {
		cfg.Requests = 16
	}
	if cfg.Stall == 0 {
		cfg.Stall = 30 * time.Second
	}
	if cfg.Sent == nil {
		cfg.Sent = new(atomic.Int64)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, slots: make(chan struct{}, cfg.Requests), later: make(chan struct{}, max(1, cfg.Requests/2))}
	s.server = &http.Server{
		Handler:           s,
		MaxHeaderBytes:    headerBytes,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return s
}

// Serve answers connections of l until Shutdown, and closes l. It may be called for
// several listeners.
func (s *Server) Serve(l net.Listener) error {
	err := s.server.Serve(limit(l, connsPerSlot*s.cfg.Requests))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown lets answers under way finish until ctx ends, then breaks them off.
// When it returns no request is answered any more. It is idempotent.
func (s *Server) Shutdown(ctx context.Context) {
	s.once.Do(func() { s.shutdown(ctx) })
}

func (s *Server) shutdown(ctx context.Context) {
	if s.server.Shutdown(ctx) != nil {
		_ = s.server.Close() // listeners are closed already; nothing to add
	}
	// The server does not wait for handlers whose connections it closed. Who
	// has all slots, and keeps them, knows that there are none.
	for range cap(s.slots) {
		s.slots <- struct{}{}
	}
}

// ServeHTTP answers one request, when one of the slots is free. Requests that the
// client does not wait for (rankOf) take half of them at most. How urgent it is, Answer
// finds in the request's context (sched.RankOf).
func (s *Server) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	ctx := req.Context()
	if rank := rankOf(req.Header); rank != sched.Demand {
		if take(ctx, s.later) != nil {
			return
		}
		defer func() { <-s.later }()
		req = req.WithContext(sched.WithRank(ctx, rank))
	}
	if take(ctx, s.slots) != nil {
		return
	}
	defer func() { <-s.slots }()
	// Also bounds the small answers, which are written when the handler ends.
	if err := s.deadline(w); err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if err := s.cfg.Answer(w, req); err != nil {
		s.refuse(w, req, err)
	}
}

// take takes one of the slots when it is free, unless ctx ends.
func take(ctx context.Context, slots chan<- struct{}) error {
	select {
	case slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// deadline gives the client the time of one stall for what is written next.
func (s *Server) deadline(w http.ResponseWriter) error {
	err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.cfg.Stall))
	if errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	return err
}
