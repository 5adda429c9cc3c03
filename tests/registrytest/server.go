package registrytest

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Options change what the registry is like. The zero value is plain HTTP,
// anonymous, with ranges and the referrers API.
type Options struct {
	TLS      bool         // HTTPS with HTTP/2; clients need TLSConfig
	HTTP1    bool         // HTTPS without HTTP/2
	Listener net.Listener // nil is a free port of 127.0.0.1
	Auth     *Auth        // nil is anonymous
	// Redirect sends requests for blobs on to a second server at another port
	// by URLs that are valid for RedirectTTL (0: until ExpireRedirects). The
	// second server refuses requests with an Authorization header, as S3 does.
	Redirect    bool
	RedirectTTL time.Duration
	NoRange     bool // Range headers are ignored
	NoReferrers bool // no referrers API, only the tag schema
	PageSize    int  // of referrers; 0 is no pagination
	NoDigest    bool // no Docker-Content-Digest header
}

// Server is a running registry. Its methods may be called at any time.
type Server struct {
	opts    Options
	main    *httptest.Server
	storage *httptest.Server // redirect target, or nil
	done    chan struct{}    // closed by Close: ends stalls

	mu      sync.Mutex
	repos   map[string]*repo           // protected by mu
	faults  []*fault                   // protected by mu
	tokens  map[string]time.Time       // valid until; protected by mu
	signed  map[string]time.Time       // redirect signatures, valid until; protected by mu
	log     []Request                  // protected by mu
	blobs   map[digest.Digest]Counters // protected by mu
	total   Counters                   // protected by mu
	fetched int                        // tokens given out; protected by mu

	uploads  map[string][]byte // by repository and session; protected by mu
	sessions int               // protected by mu
}

// Counters count requests and the body bytes sent in answer to them.
type Counters struct {
	Requests int
	Bytes    int64
}

// Request is one request as it was received.
type Request struct {
	Method, Host, Path, Query, Range, Authorization, UserAgent string

	Storage bool // at the redirect target
	Proto   int  // HTTP major version
}

// TB is the part of testing.TB that Start needs; benchmarks outside of tests use New.
type TB interface {
	Helper()
	Cleanup(func())
}

// Start returns a Server that is closed at the end of the test.
func Start(t TB, opts Options) *Server {
	t.Helper()
	s := New(opts)
	t.Cleanup(s.Close)
	return s
}

// New returns a running Server; the caller closes it.
func New(opts Options) *Server {
	s := &Server{
		opts: opts, done: make(chan struct{}),
		repos:  map[string]*repo{},
		tokens: map[string]time.Time{},
		signed: map[string]time.Time{},
		blobs:  map[digest.Digest]Counters{},

		uploads: map[string][]byte{},
	}
	if opts.Redirect {
		s.storage = serve(http.HandlerFunc(s.serveStorage), opts, nil)
	}
	s.main = serve(http.HandlerFunc(s.serveRegistry), opts, opts.Listener)
	return s
}

func serve(h http.Handler, opts Options, l net.Listener) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // the client's error tells more
	if l != nil {
		_ = s.Listener.Close() // never used
		s.Listener = l
	}
	if opts.TLS {
		s.EnableHTTP2 = !opts.HTTP1
		s.StartTLS()
	} else {
		s.Start()
	}
	return s
}

// Close stops the registry and waits for requests under way, whose stalls end.
func (s *Server) Close() {
	select {
	case <-s.done:
		return
	default:
		close(s.done)
	}
	s.main.CloseClientConnections()
	s.main.Close()
	if s.storage != nil {
		s.storage.CloseClientConnections()
		s.storage.Close()
	}
}

// Host is the "host:port" of the registry, for references.
func (s *Server) Host() string { return s.main.Listener.Addr().String() }

// StorageHost is the "host:port" of the redirect target.
func (s *Server) StorageHost() string { return s.storage.Listener.Addr().String() }

// TLSConfig trusts the certificate of a registry with Options.TLS.
func (s *Server) TLSConfig() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(s.main.Certificate())
	if s.storage != nil {
		pool.AddCert(s.storage.Certificate())
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

// Total counts everything since New or Reset, tokens excluded.
func (s *Server) Total() Counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

// BlobStats counts what was asked and sent of one blob, segment or manifest.
func (s *Server) BlobStats(d digest.Digest) Counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs[d]
}

// Tokens is how many tokens the token service gave out.
func (s *Server) Tokens() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fetched
}

// Requests lists those whose path contains match, in order of arrival.
func (s *Server) Requests(match string) []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.Clone(s.log)
	return slices.DeleteFunc(list, func(r Request) bool { return !strings.Contains(r.Path, match) })
}

// Reset forgets the counters and the list of requests.
func (s *Server) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log, s.total, s.fetched = nil, Counters{}, 0
	clear(s.blobs)
}

// maxLog bounds the list of requests: a benchmark sends many.
const maxLog = 100_000

func (s *Server) record(r *http.Request, storage bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path != "/token" {
		s.total.Requests++
	}
	if len(s.log) < maxLog {
		s.log = append(s.log, Request{
			Method: r.Method, Host: r.Host, Path: r.URL.Path, Query: r.URL.RawQuery,
			Range: r.Header.Get("Range"), Authorization: r.Header.Get("Authorization"),
			UserAgent: r.Header.Get("User-Agent"), Storage: storage, Proto: r.ProtoMajor,
		})
	}
}

func (s *Server) count(d digest.Digest, requests int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total.Bytes += bytes
	if d == "" {
		return
	}
	c := s.blobs[d]
	c.Requests += requests
	c.Bytes += bytes
	s.blobs[d] = c
}
