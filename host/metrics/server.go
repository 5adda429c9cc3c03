package metrics

import (
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Bounds of what others may have of the server.
const (
	maxConns   = 64
	maxScrapes = 4 // at a time; more are answered with 503
	maxHeader  = 16 << 10
	readTime   = 10 * time.Second
	answerTime = 30 * time.Second
)

// Server answers /metrics and /healthz.
type Server struct{ http http.Server }

// New returns a Server of what read returns, and of the process. healthy says why the
// node is not, if it is not.
func New(read func() Values, healthy func() error, log *slog.Logger) *Server {
	r := prometheus.NewRegistry()
	r.MustRegister(newCollector(read), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), ErrorHandling: promhttp.HTTPErrorOnError,
		MaxRequestsInFlight: maxScrapes, Timeout: answerTime,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := healthy(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n")) // who does not read it has gone
	})
	return &Server{http.Server{
		Handler: mux, ReadTimeout: readTime, WriteTimeout: 2 * answerTime, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), // what clients do wrong is theirs
	}}
}

// Serve answers on l until Close.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(netutil.LimitListener(l, maxConns))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Close breaks off what is under way: Prometheus asks again.
func (s *Server) Close() error { return s.http.Close() }
