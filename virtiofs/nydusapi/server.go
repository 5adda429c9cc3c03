package nydusapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
)

// Mounts is what the API changes. Its methods may be called concurrently; they take
// less time than a client waits.
type Mounts interface {
	// Mount shows source, an absolute path of the host, at path of the shared file
	// system. config is of no meaning here. ErrAlreadyExists when there is a mount,
	// ErrPermissionDenied when this kind is not allowed.
	Mount(path string, kind Kind, source, config string) error
	// Unmount ends it. ErrNotFound when there is none.
	Unmount(path string) error
}

// Config of a Server.
type Config struct {
	// ID is what the daemon calls itself; Kata only logs it.
	ID     string
	Mounts Mounts
	Log    *slog.Logger // nil for none
}

// Bounds of a client. A body is one record with two paths and a configuration, which
// the snapshotter passed in a mount option.
const (
	maxHeader    = 16 << 10 // bytes
	maxBody      = 1 << 20  // bytes
	readTimeout  = 10 * time.Second
	writeTimeout = 45 * time.Second // of reading the body, the work and the answer
	idleTimeout  = 15 * time.Second
	endTimeout   = 5 * time.Second // of requests under way when the server ends
)

// Server answers requests. It is an http.Handler.
type Server struct {
	cfg    Config
	routes map[string]map[string]handler // by path and method
}

// handler answers a request: with a body when there is one.
type handler func(r *http.Request) (body any, err error)

var _ http.Handler = (*Server)(nil)

// New makes a server.
func New(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg}
	s.routes = map[string]map[string]handler{
		"/api/v1/daemon": {http.MethodGet: s.daemon},
		"/api/v1/mount":  {http.MethodPost: s.mount, http.MethodDelete: s.unmount},
	}
	return s
}

// Serve answers on l, which it closes, until ctx ends; then it returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler: s, MaxHeaderBytes: maxHeader,
		ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
		defer cancel()
		ended <- errors.Join(srv.Shutdown(ctx), srv.Close())
	})
	err := srv.Serve(l)
	if stop() {
		return fmt.Errorf("serve the API at %s: %w", l.Addr(), err)
	}
	if err := <-ended; err != nil {
		return fmt.Errorf("end the API at %s: %w", l.Addr(), err)
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	methods, ok := s.routes[r.URL.Path]
	if !ok {
		s.refuse(w, r, fmt.Errorf("path %.64q: %w: there are /api/v1/daemon and /api/v1/mount", r.URL.Path, errdefs.ErrNotFound))
		return
	}
	h, ok := methods[r.Method]
	if !ok {
		for m := range methods {
			w.Header().Add("Allow", m)
		}
		s.refuse(w, r, fmt.Errorf("method %.16q of %s: %w", r.Method, r.URL.Path, errMethod))
		return
	}
	body, err := h(r)
	switch {
	case err != nil:
		s.refuse(w, r, err)
	case body == nil: // Kata takes this status alone for success
		w.WriteHeader(http.StatusNoContent)
	default:
		s.write(w, http.StatusOK, body)
	}
}

var errMethod = errors.New("there is no such method")

// classes give an error its status, and the code that stands in it.
var classes = []struct {
	is     func(error) bool
	status int
	code   string
}{
	{func(err error) bool { return errors.Is(err, errMethod) }, http.StatusMethodNotAllowed, "MethodNotAllowed"},
	{isTooLarge, http.StatusRequestEntityTooLarge, "TooLarge"},
	{errdefs.IsInvalidArgument, http.StatusBadRequest, "InvalidArgument"},
	{errdefs.IsPermissionDenied, http.StatusForbidden, "PermissionDenied"},
	{errdefs.IsNotFound, http.StatusNotFound, "NotFound"},
	{errdefs.IsAlreadyExists, http.StatusConflict, "AlreadyExists"},
	{errdefs.IsFailedPrecondition, http.StatusConflict, "FailedPrecondition"},
	{errdefs.IsResourceExhausted, http.StatusInsufficientStorage, "ResourceExhausted"},
	{errdefs.IsUnavailable, http.StatusServiceUnavailable, "Unavailable"},
}

func isTooLarge(err error) bool {
	var large *http.MaxBytesError
	return errors.As(err, &large)
}

// failure is an error on the wire (ErrorMessage of both clients); the message is
// what Kata reports of it.
type failure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	status, f := http.StatusInternalServerError, failure{Code: "Internal", Message: err.Error()}
	for _, c := range classes {
		if c.is(err) {
			status, f.Code = c.status, c.code
			break
		}
	}
	s.cfg.Log.Warn("request refused", "method", r.Method, "uri", fmt.Sprintf("%.256s", r.RequestURI), "status", status, "err", err)
	s.write(w, status, f)
}

func (s *Server) write(w http.ResponseWriter, status int, body any) {
	text, err := json.Marshal(body)
	if err != nil { // only strings are in it
		s.cfg.Log.Error("answer", "err", err)
		status, text = http.StatusInternalServerError, []byte(`{"code":"Internal","message":"the answer cannot be written"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if _, err := w.Write(text); err != nil {
		s.cfg.Log.Debug("the client of the API is gone", "err", err)
	}
}
