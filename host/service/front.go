package service

import (
	"context"
	"sync"

	"github.com/containerd/ttrpc"

	"github.com/tatami-containers/tatami/protocols/wireerr"
)

// newServer returns a ttrpc server that turns classes of errors into status
// codes. Nothing below it knows of those.
func newServer(more ...ttrpc.UnaryServerInterceptor) (*ttrpc.Server, error) {
	return ttrpc.NewServer(ttrpc.WithChainUnaryServerInterceptor(append([]ttrpc.UnaryServerInterceptor{wireerr.Server}, more...)...))
}

// front is the server of the control socket. It counts calls, because the
// Shutdown of ttrpc takes a connection for idle while it waits for the answer
// to its first call.
type front struct {
	server *ttrpc.Server

	mu       sync.Mutex
	running  int           // calls; protected by mu
	stopping chan struct{} // nil until drain, closed when running is 0; protected by mu
}

func newFront() (*front, error) {
	f := new(front)
	var err error
	f.server, err = newServer(f.count)
	return f, err
}

func (f *front) count(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	if !f.begin() {
		return nil, errStopping
	}
	defer f.end()
	return method(ctx, unmarshal)
}

func (f *front) begin() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopping != nil {
		return false
	}
	f.running++
	return true
}

func (f *front) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running--; f.running == 0 && f.stopping != nil {
		close(f.stopping)
	}
}

// drain refuses further calls and waits for those under way, until ctx ends. It
// is called once.
func (f *front) drain(ctx context.Context) {
	f.mu.Lock()
	f.stopping = make(chan struct{})
	if f.running == 0 {
		close(f.stopping)
	}
	done := f.stopping
	f.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
}
