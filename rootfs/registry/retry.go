package registry

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// maxBackoff bounds the pause before a retry that the registry left to us.
	// From 100 ms, four retries wait 1.5 s together.
	maxBackoff = 5 * time.Second
	// maxRetryAfter bounds the pause that a registry may ask for; a longer one
	// is reported instead of waited for.
	maxRetryAfter = 30 * time.Second
	// rangelessFor is how long a host that ignored a Range header is taken to
	// do so always. A proxy cache does it only until it has the blob
	// (goharbor/harbor#23875).
	rangelessFor = time.Minute
)

// retryAfter parses the header of this name: seconds or a date. It is negative
// when there is none.
func retryAfter(value string, now time.Time) time.Duration {
	if value == "" {
		return -1
	}
	if n, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(value); err == nil {
		return max(0, t.Sub(now))
	}
	return -1
}

// retry calls do until it succeeds, fails for good, or has been repeated often
// enough. A mirror that has a pause is not waited for.
func (r *Repository) retry(ctx context.Context, do func() error) error {
	for n := 0; ; n++ {
		if wait := r.client.peers.get(r.host).pause(); wait > 0 && !r.last {
			e := r.fault("repository", errdefs.ErrResourceExhausted, errPause)
			e.retryAfter = wait
			return e
		}
		err := do()
		if err == nil {
			return nil
		}
		if !r.again(ctx, n, err) {
			return cmp.Or(ctx.Err(), err)
		}
	}
}

// again waits before retry number n of what failed with err. It is false when
// there is to be none.
func (r *Repository) again(ctx context.Context, n int, err error) bool {
	var e *Error
	if ctx.Err() != nil || n >= r.client.cfg.RetryMax || !errors.As(err, &e) {
		return false
	}
	if (!e.temporary || !r.last) && (!e.stale || n > 0) {
		return false // the next host is nearer than a mirror's recovery
	}
	if e.retryAfter > maxRetryAfter {
		e.Class = errdefs.ErrResourceExhausted
		e.Remedy = "the registry asks to come back after " + e.retryAfter.String()
		return false
	}
	wait := backoff(r.client.cfg.RetryWait, n)
	if e.refused {
		wait = 0 // the host has a pause, which every request keeps
	}
	r.client.stats.retries.Add(1)
	peer := r.client.peers.get(r.host)
	peer.retries.Add(1)
	if e.refused || errors.Is(e, errStalled) {
		peer.slower()
	}
	r.client.log.Debug("registry request is tried again", "registry", r.host, "repository", r.Name(), "wait", wait, "error", err)
	return sleep(ctx, wait) == nil
}

// backoff doubles with n and has half of itself as jitter, so that the ranges
// that failed together do not come back together.
func backoff(first time.Duration, n int) time.Duration {
	wait := min(first<<min(n, 16), maxBackoff)
	return wait/2 + rand.N(wait/2+1)
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// maxHosts bounds what is remembered; a full table starts again empty.
const maxHosts = 4096

// hosts holds what was learnt of the registries.
type hosts struct {
	mu    sync.Mutex
	known map[string]hostState // by "host:port", or Repository.place; protected by mu
}

type hostState struct {
	down      time.Time // a mirror that is not asked before
	rangeless time.Time // Range headers are ignored until
}

func (h *hosts) get(host string) hostState {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.known[host]
}

func (h *hosts) set(host string, change func(*hostState)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.known[host]
	change(&s)
	if h.known == nil || len(h.known) >= maxHosts {
		h.known = map[string]hostState{}
	}
	h.known[host] = s
}

func (h *hosts) rangeless(host string) bool {
	return time.Now().Before(h.get(host).rangeless)
}
