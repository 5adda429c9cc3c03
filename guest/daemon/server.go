package daemon

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/tatami-containers/tatami/protocols/wireerr"
)

const (
	// serverGrace is how long calls under way may take to end.
	serverGrace = 3 * time.Second
	// linger is how long the last answer gets to reach its peer: out of the
	// ttrpc server, and, where the machine is about to be switched off, out of
	// the queue of the vsock device.
	linger = 50 * time.Millisecond
)

// server is a ttrpc server that can end without losing an answer. The Shutdown
// of ttrpc v1.2.10 cannot: a connection that was idle when a request came counts
// as idle until the answer is sent (serverConn.run looks at its state only
// between messages).
type server struct {
	*ttrpc.Server
	log     *slog.Logger
	serving sync.WaitGroup

	mu        sync.Mutex
	listeners []net.Listener // protected by mu
	stopping  bool           // protected by mu
	active    int            // calls under way; protected by mu
	lastEnd   time.Time      // of a call; protected by mu
}

func newServer(log *slog.Logger) (*server, error) {
	s := &server{log: log}
	var err error
	s.Server, err = ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(s.intercept))
	return s, err
}

func (s *server) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	s.mu.Lock()
	s.active++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.active--
		s.lastEnd = time.Now()
	}()
	return wireerr.Server(ctx, unmarshal, info, method)
}

// start serves on a listener until stop.
func (s *server) start(ctx context.Context, l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listeners = append(s.listeners, l)
	s.serving.Go(func() {
		err := s.Serve(ctx, l)
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.stopping {
			s.log.Error("no calls any more", "address", l.Addr().String(), "error", err)
		}
	})
}

// stop takes no more connections, lets calls end, and closes the rest.
func (s *server) stop() {
	s.mu.Lock()
	s.stopping = true
	for _, l := range s.listeners {
		_ = l.Close() // connections are what counts
	}
	s.mu.Unlock()
	for deadline := time.Now().Add(serverGrace); s.busy() && time.Now().Before(deadline); {
		time.Sleep(linger / 10)
	}
	_ = s.Close() // its listeners are closed already
	s.serving.Wait()
}

func (s *server) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.active > 0 || time.Since(s.lastEnd) < linger
}
