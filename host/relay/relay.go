// Package relay is the registry that one sandbox sees: the read side of the
// OCI distribution API over the images that were granted to it, with one
// extension, ranges of a segment:
//
//	GET|HEAD /v2/
//	GET|HEAD /v2/<name>/manifests/<digest or tag>
//	GET|HEAD /v2/<name>/blobs/<digest>             Range
//	GET|HEAD /v2/<name>/referrers/<digest>         ?artifactType=
//	GET|HEAD /v2/<name>/segments/<segment id>      Range; plain bytes
//
// As with containerd's mirrors, ?ns=<domain> tells repositories of the same
// name at several registries apart.
//
// The guest is assumed hostile: it reads what was granted and nothing else, and
// what it can hold of the node is bounded (connections, requests at a time, one
// buffer for each, and the time it may leave an answer untouched). An answer
// that cannot be completed is broken off, never ended early as if it were whole.
package relay

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/net/netutil"
)

// Image is what the relay serves of one image. A kind is the path element that
// leads to an object: "manifests", "blobs" or "segments".
type Image interface {
	// Find describes an object: media type and size in bytes.
	Find(kind string, d digest.Digest) (ocispec.Descriptor, bool)
	// Open returns the bytes [off, off+n) of an object that Find knows. It is
	// of class Unavailable when another source may do better.
	Open(ctx context.Context, kind string, d digest.Digest, off, n int64) (io.ReadCloser, error)
	// Referrers describes the artifacts whose subject the image is.
	Referrers() []ocispec.Descriptor
}

// Grant lets a sandbox read one image.
type Grant struct {
	Domain     string // "docker.io", as a mirror is asked for it: ?ns=
	Repository string // as it appears in the path: "library/debian"
	Tag        string // may be empty
	Manifest   digest.Digest
	Image      Image
}

// Config of a Relay.
type Config struct {
	// Grants returns what the sandbox may read at the moment.
	Grants func() []Grant
	// Requests bounds those served at a time, others wait; 16 when 0.
	Requests int
	// Stall is how long the guest may take nothing of an answer; 30 s when 0.
	Stall time.Duration
	// Sent counts body bytes, if it is there.
	Sent *atomic.Int64
	Log  *slog.Logger
}

// piece is how many bytes are read and written at a time, and the memory that
// one request takes.
const piece = 256 << 10

// Limits of the HTTP server, for a guest that opens connections and says
// nothing or too much.
const (
	headerBytes   = 16 << 10
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	connsPerSlot  = 4 // connections for each request that is served at a time
)

// Relay serves one sandbox.
type Relay struct {
	cfg    Config
	slots  chan struct{} // one element for each request being served
	pool   sync.Pool     // *[piece]byte
	server *http.Server
	once   sync.Once // of Shutdown
}

// New returns a Relay. It serves nothing until Serve is called.
func New(cfg Config) *Relay {
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
	r := &Relay{cfg: cfg, slots: make(chan struct{}, cfg.Requests)}
	r.pool.New = func() any { return new([piece]byte) }
	r.server = &http.Server{
		Handler:           r,
		MaxHeaderBytes:    headerBytes,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return r
}

// Serve answers connections of l until Close or Shutdown, and closes l. It may be called
// for several listeners.
func (r *Relay) Serve(l net.Listener) error {
	err := r.server.Serve(netutil.LimitListener(l, connsPerSlot*r.cfg.Requests))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown lets answers under way finish until ctx ends, then breaks them off.
// When it returns no image is read any more. It is idempotent.
func (r *Relay) Shutdown(ctx context.Context) {
	r.once.Do(func() { r.shutdown(ctx) })
}

func (r *Relay) shutdown(ctx context.Context) {
	if r.server.Shutdown(ctx) != nil {
		_ = r.server.Close() // listeners are closed already; nothing to add
	}
	// The server does not wait for handlers whose connections it closed. Who
	// has all slots, and keeps them, knows that there are none.
	for range cap(r.slots) {
		r.slots <- struct{}{}
	}
}

// ServeHTTP answers one request, when one of the sandbox's slots is free.
func (r *Relay) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-req.Context().Done():
		return
	}
	// Also bounds the small answers, which are written when the handler ends.
	if err := r.deadline(w); err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if err := r.route(w, req); err != nil {
		r.refuse(w, req, err)
	}
}

// deadline gives the guest the time of one stall for what is written next.
func (r *Relay) deadline(w http.ResponseWriter) error {
	err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(r.cfg.Stall))
	if errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	return err
}
