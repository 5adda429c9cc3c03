package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// maxPeers bounds the hosts that are known; a full table starts again empty.
const maxPeers = 1024

// peers has what is known of each host that requests go to: registries, mirrors,
// redirect targets and token services.
type peers struct {
	mu    sync.Mutex
	known map[string]*peer // by "host:port"; protected by mu
	cfg   Config
}

// peer is one host: how much it takes, and what has been asked of it.
type peer struct {
	host string // "host:port"

	requests, manifests, bytes, retries, refused, hedges, late, wrong atomic.Int64

	mu    sync.Mutex
	pacer pacer // protected by mu
	// line says who goes next to a host that has refused requests; nil: who came first.
	// Protected by mu.
	line *sched.Slots
	// window is of the ranges that streams ask this host for; their bytes may
	// come from a redirect target. Protected by mu.
	window window
	waits  patience // protected by mu
}

// HostStats are the counters of one host: a registry, a mirror, a redirect target
// or a token service.
type HostStats struct {
	Host     string // "host:port"
	Requests int64  // each hop of a redirect is one
	// Manifests are the GET requests for manifests among them: what Docker Hub
	// counts as pulls (docs.docker.com/docker-hub/usage/pulls).
	Manifests int64
	Bytes     int64 // received in bodies
	Retries   int64
	Refused   int64 // answers with 429, 503, or another status and a pause
	Hedges    int64 // requests sent here because another one stood still
	Late      int64 // requests that such a one has overtaken
	Wrong     int64 // times that bytes from here were found to be wrong
}

// get returns the peer of a host.
func (p *peers) get(host string) *peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if one, ok := p.known[host]; ok {
		return one
	}
	if p.known == nil || len(p.known) >= maxPeers {
		p.known = map[string]*peer{}
	}
	one := &peer{host: host}
	p.known[host] = one
	return one
}

// stats lists the hosts by name.
func (p *peers) stats() []HostStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]HostStats, 0, len(p.known))
	for host, one := range p.known {
		s := one.stats()
		s.Host = host
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b HostStats) int { return strings.Compare(a.Host, b.Host) })
	return list
}

func (p *peer) stats() HostStats {
	return HostStats{
		Requests: p.requests.Load(), Manifests: p.manifests.Load(), Bytes: p.bytes.Load(),
		Retries: p.retries.Load(), Refused: p.refused.Load(),
		Hedges: p.hedges.Load(), Late: p.late.Load(), Wrong: p.wrong.Load(),
	}
}

// refusalWait is how much longer a pause is that the host left to us than that
// of one request which was lost, Config.RetryWait.
const refusalWait = 4

var errPause = errors.New("the host has refused requests and has a pause")

// pauseError is a request that was not sent: the host asked for a pause that is
// longer than anybody waits here.
type pauseError struct{ asked time.Duration }

func (e *pauseError) Error() string {
	return fmt.Sprintf("not sent: the host has refused requests and asks to come back after %s", e.asked)
}

// pause is for how long no request may go to the host.
func (p *peer) pause() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Until(p.pacer.until)
}

// wait returns when one more request may go to the host. When it refuses some they stand
// in line; who is first keeps his place until the next one may go.
func (p *peer) wait(ctx context.Context) error {
	leave, err := p.queue().Enter(ctx)
	if err != nil {
		return err
	}
	if err := p.first(ctx); err != nil {
		leave()
		return err
	}
	if gap := p.gap(); gap > 0 {
		time.AfterFunc(gap, leave)
		return nil
	}
	leave()
	return nil
}

// gap is pacer.gap.
func (p *peer) gap() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pacer.gap()
}

// queue is where to wait for a host that has refused requests; nil for others.
func (p *peer) queue() *sched.Slots {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.pacer.refusing(now) {
		return nil
	}
	return p.line
}

// first is wait for who is first in the line.
func (p *peer) first(ctx context.Context) error {
	for {
		at, gap, err := p.reserve()
		if err != nil {
			return err
		}
		err = sleep(ctx, time.Until(at))
		p.mu.Lock()
		stale := p.pacer.stale(at)
		if err != nil {
			p.pacer.giveBack(time.Now(), at, gap)
		}
		p.mu.Unlock()
		if err != nil || !stale {
			return err
		}
	}
}

func (p *peer) reserve() (at time.Time, gap time.Duration, err error) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pacer.asked > 0 && now.Before(p.pacer.until) {
		return now, 0, &pauseError{p.pacer.asked}
	}
	at = p.pacer.reserve(now)
	return at, p.pacer.gap(), nil
}

// note takes up how a request ended that was sent at some time.
func (p *peer) note(cfg Config, sent time.Time, resp *http.Response) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !refusal(resp) {
		p.pacer.answer(sent)
		return
	}
	p.refused.Add(1)
	if p.line == nil {
		p.line = cfg.Sched.Turns("paced "+p.host, 1)
	}
	asked := retryAfter(resp.Header.Get("Retry-After"), now)
	wait := backoff(refusalWait*cfg.RetryWait, p.pacer.row)
	if asked >= 0 {
		wait = min(asked, maxRetryAfter)
		wait += rand.N(wait/8 + 1) // not all nodes at once
	}
	p.pacer.refuse(now, sent, asked, wait)
}

// take is window.take.
func (p *peer) take(most int, others bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.window.take(most, others)
}

func (p *peer) give() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.window.give()
}

// got is window.add.
func (p *peer) got(n int) (more bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.window.add(now, n)
}

// slower has streams ask for fewer ranges at the same time.
func (p *peer) slower() {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.window.halve(now)
}

// request is patience.request, waited patience.waited, slowAfter patience.after.
func (p *peer) request() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waits.request()
}

func (p *peer) waited(d time.Duration) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waits.waited(now, d)
}

// finished is patience.finished.
func (p *peer) finished() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waits.finished()
}

// lost is patience.lost.
func (p *peer) lost(d time.Duration) bool {
	now := time.Now()
	p.late.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waits.lost(now, d)
}

func (p *peer) slowAfter(least, stall time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waits.after(least, stall)
}

// spend tells whether a second request may be sent, and counts it. A host that
// refuses requests gets none.
func (p *peer) spend() bool {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.pacer.refusing(now) && p.waits.spend()
}

// refusal tells whether an answer says that the host has too much to do, which
// concerns all requests to it.
func refusal(resp *http.Response) bool {
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return true
	}
	return temporaryStatus(resp.StatusCode) && resp.Header.Get("Retry-After") != ""
}

// paced is a transport that keeps to what the host of each request takes. It
// sees every hop of a redirect.
type paced struct {
	closer
	peers *peers
}

// maxHostName bounds the name of a host in bytes: 253 in text (RFC 1035, section
// 2.3.4), and a port. A redirect may name anything, and
// what it names is remembered and shown.
const maxHostName = 253 + len(":65535")

// RoundTrip implements http.RoundTripper.
func (t paced) RoundTrip(req *http.Request) (*http.Response, error) {
	if n := len(req.URL.Host); n > maxHostName {
		if req.Body != nil {
			_ = req.Body.Close() // nothing was sent
		}
		return nil, fmt.Errorf("%.64q… is no host: its name has %d bytes: %w", req.URL.Host, n, errdefs.ErrInvalidArgument)
	}
	peer := t.peers.get(req.URL.Host)
	up := t.peers.cfg.Sched.Upstream(req.URL.Host)
	end, err := t.turn(req.Context(), peer, up)
	if err != nil {
		if req.Body != nil {
			_ = req.Body.Close() // nothing was sent
		}
		return nil, err
	}
	peer.requests.Add(1)
	if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/manifests/") {
		peer.manifests.Add(1)
	}
	req, part := connected(req, up)
	sent := time.Now()
	resp, err := t.closer.RoundTrip(req)
	if err != nil {
		part()
		end()
		return nil, err
	}
	peer.note(t.peers.cfg, sent, resp)
	resp.Body = &endedBody{ReadCloser: &countedBody{resp.Body, &peer.bytes}, end: func() { part(); end() }}
	return resp, nil
}

// connected lets up know over which connection the answer to a request comes, until
// part is called.
func connected(req *http.Request, up *sched.Upstream) (_ *http.Request, part func()) {
	if up == nil {
		return req, func() {}
	}
	if t, ok := req.Context().Value(tripKey{}).(*trip); ok {
		t.up = up
	}
	var mu sync.Mutex
	done := func() {} // protected by mu
	trace := &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) {
		mu.Lock()
		defer mu.Unlock()
		done() // the connection before was lost
		done = up.Uses(c.Conn)
	}}
	return req.WithContext(httptrace.WithClientTrace(req.Context(), trace)), func() {
		mu.Lock()
		defer mu.Unlock()
		done()
	}
}

// turn waits until a request may be sent; end is called when its answer has been read,
// or is not read for a while (turn).
func (t paced) turn(ctx context.Context, peer *peer, up *sched.Upstream) (end func(), err error) {
	if ctx.Value(atOnceKey{}) != nil {
		return func() {}, peer.wait(ctx)
	}
	resume := hold(ctx)
	end, err = up.Begin(ctx)
	resume()
	if err != nil {
		return nil, err
	}
	if err := peer.wait(ctx); err != nil {
		end()
		return nil, err
	}
	if t, ok := ctx.Value(turnKey{}).(*turn); ok && up != nil {
		t.end = end
	}
	return end, nil
}

// countedBody counts what is read.
type countedBody struct {
	io.ReadCloser
	bytes *atomic.Int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.bytes.Add(int64(n))
	return n, err
}
