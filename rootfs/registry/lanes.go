package registry

import (
	"context"
	"io"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// lanesPerHost is how many transports share the requests to a host. HTTP/2 puts
// all requests of a transport on one connection, whose window and losses then
// bound them together; four of them are as fast as four connections of HTTP/1.1
// (BenchmarkLink in tests/fetch).
const lanesPerHost = 4

// lanes is a transport that sends each request over the transport which has the
// fewest under way. One request at a time uses one connection, with HTTP/1.1 as
// with HTTP/2.
type lanes struct {
	all []*http.Transport

	mu   sync.Mutex
	used map[string][]int // requests under way on each lane, by host; protected by mu
}

func newLanes(t *http.Transport) *lanes {
	l := &lanes{all: []*http.Transport{t}, used: map[string][]int{}}
	for len(l.all) < lanesPerHost {
		l.all = append(l.all, t.Clone())
	}
	return l
}

// trip tells the lanes, by the context of a request, what to keep off, and what
// they chose; its hedge when the request, or its answer, waits for its turn; and who asked
// where the answer came from in the end.
type trip struct {
	hedge *hedge
	up    *sched.Upstream // of the latest hop; for who has the answer
	avoid int             // lane, or -1
	taken atomic.Int64
}

type tripKey struct{}

func withTrip(ctx context.Context, t *trip) context.Context {
	return context.WithValue(ctx, tripKey{}, t)
}

// RoundTrip implements http.RoundTripper. The lane is in use until the body of the
// answer is closed.
func (l *lanes) RoundTrip(req *http.Request) (*http.Response, error) {
	host := req.URL.Host
	i := l.take(host, req)
	resp, err := l.all[i].RoundTrip(req)
	if err != nil {
		l.give(host, i)
		return nil, err
	}
	resp.Body = &endedBody{ReadCloser: resp.Body, end: sync.OnceFunc(func() { l.give(host, i) })}
	return resp, nil
}

func (l *lanes) take(host string, req *http.Request) int {
	t, _ := req.Context().Value(tripKey{}).(*trip)
	l.mu.Lock()
	defer l.mu.Unlock()
	used := l.used[host]
	if used == nil {
		used = make([]int, len(l.all))
		l.used[host] = used
	}
	best := -1
	for i := range used {
		if t != nil && i == t.avoid {
			continue
		}
		if best < 0 || used[i] < used[best] {
			best = i
		}
	}
	used[best]++
	if t != nil {
		t.taken.Store(int64(best))
	}
	return best
}

// give ends a request. Hosts without any are forgotten.
func (l *lanes) give(host string, i int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	used := l.used[host]
	used[i]--
	for _, n := range used {
		if n > 0 {
			return
		}
	}
	delete(l.used, host)
}

// CloseIdleConnections is for http.Client.
func (l *lanes) CloseIdleConnections() {
	for _, t := range l.all {
		t.CloseIdleConnections()
	}
}

// endedBody tells when it is closed.
type endedBody struct {
	io.ReadCloser
	end func()
}

func (b *endedBody) Close() error {
	err := b.ReadCloser.Close()
	b.end()
	return err
}
