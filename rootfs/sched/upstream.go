package sched

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// requestsPerHost is how many answers one host sends at a time; requestsReserve of
	// them are only for what somebody waits for in the most important class.
	requestsPerHost = 32
	requestsReserve = 8

	// maxHosts bounds the hosts that are known; what comes when all of them are in use
	// shares one more.
	maxHosts = 256
	// hostIdle is how long a host is known that nobody asks for anything.
	hostIdle = 10 * time.Minute
)

// Upstream is a host that is downloaded from. A nil Upstream lets everything pass.
type Upstream struct {
	requests   *Slots
	rate, link *rateQueue
	read       *atomic.Int64 // the scheduler's

	used time.Duration // when somebody asked for it; protected by the scheduler's mu
}

func newUpstream(host string, s *Scheduler) *Upstream {
	u := &Upstream{link: s.link, read: &s.read, rate: newRateQueue(host, s),
		requests: newSlots("requests "+host, requestsPerHost, s)}
	u.requests.turns.reserve = requestsReserve
	u.requests.turns.ranked = true
	u.rate.pace.percent = s.cfg.Link == 0
	u.rate.pace.bounds(0)
	return u
}

// idle says whether nothing goes on.
func (u *Upstream) idle() bool {
	u.rate.mu.Lock()
	idle := u.rate.est.engaged == 0 && u.rate.est.out == 0 && u.rate.est.waiting == 0
	u.rate.mu.Unlock()
	u.requests.mu.Lock()
	defer u.requests.mu.Unlock()
	return idle && u.requests.turns.used == 0 && u.requests.turns.waiting == 0
}

// Begin waits until one more request may be made; end is called when its answer has
// been read, and may be called twice. The error is that of ctx.
func (u *Upstream) Begin(ctx context.Context) (end func(), err error) {
	if u == nil {
		return func() {}, ctx.Err()
	}
	leave, err := u.requests.Enter(ctx)
	if err != nil {
		return func() {}, err
	}
	u.engage(1)
	return sync.OnceFunc(func() { u.engage(-1); leave() }), nil
}

func (u *Upstream) engage(n int) {
	u.rate.engage(n)
	u.link.engage(n)
}

// Grant is some bytes that may be received now.
type Grant struct {
	N        int // bytes
	at, link hold
}

// Receive waits until some of n bytes may be received, and says how many. Work that is
// promoted meanwhile waits less. Received must be called once for every grant.
func (u *Upstream) Receive(ctx context.Context, n int) (Grant, error) {
	if err := ctx.Err(); err != nil || u == nil || n <= 0 {
		return Grant{N: max(n, 0)}, err
	}
	w := From(ctx)
	at, err := u.rate.receive(ctx, w, int64(n))
	if err != nil {
		return Grant{}, err
	}
	link, err := u.link.receive(ctx, w, at.n)
	if err != nil {
		u.rate.refuse(at)
		return Grant{}, err
	}
	u.rate.reads(at)
	u.link.reads(link)
	return Grant{N: int(link.n), at: at, link: link}, nil
}

// Received says, when a read has ended, that n bytes of a grant came. The others are
// given back. From these calls the queue learns what the host and the link can do.
func (u *Upstream) Received(g Grant, n int) {
	if u == nil || g.at.n == 0 {
		return
	}
	got := int64(min(max(n, 0), g.N))
	u.read.Add(got)
	u.rate.received(g.at, got)
	u.link.received(g.link, got)
}

// Uses says that an answer comes over a connection (of httptrace.GotConnInfo: TCP, or
// TLS over TCP) until done, which may be called twice. What the kernel has received for
// it says more about the link than what was read from it.
func (u *Upstream) Uses(c net.Conn) (done func()) {
	if u == nil {
		return func() {}
	}
	one, other := u.rate.wires.use(c), u.link.wires.use(c)
	return func() { one(); other() }
}
