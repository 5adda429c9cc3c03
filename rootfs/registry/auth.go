package registry

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// tokenTimeout bounds one token fetch, whoever waits for it.
const tokenTimeout = 30 * time.Second

// maxTokens bounds the cache; a full one starts again empty.
const maxTokens = 1024

const (
	// renewPause is how long a token service that failed to renew a token is
	// left alone, while the token is still valid.
	renewPause = 10 * time.Second
	// maxMargin is how long before its end a token counts as expired: it is on
	// its way for a while, and clocks run differently. Of a short life it is a tenth.
	maxMargin = 10 * time.Second
)

var errClosed = errors.New("the registry client is closed")

// tokenCache is the auth.Cache of a Client. It differs from the one of
// oras-go in three ways. A token is fetched under the cache's own context, so a
// cancelled request does not fail those that wait for the same token. A
// request that was refused with an old token takes the newer one that another
// request has fetched meanwhile: an expiry costs one fetch. And a token whose
// end is known is renewed before, while requests go on with it.
type tokenCache struct {
	ctx     context.Context // ends with close
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	fetches *atomic.Int64

	mu      sync.Mutex
	schemes map[string]auth.Scheme   // by host; protected by mu
	tokens  map[tokenKey]heldToken   // protected by mu
	pending map[tokenKey]*tokenFetch // protected by mu
}

var _ auth.Cache = (*tokenCache)(nil)

type tokenKey struct {
	host   string
	scheme auth.Scheme
	ns     string // the registry that a mirror passes tokens on to
	scopes string // of a bearer token
	// repository of a basic one: credentials may be for a part of a registry.
	repository string
}

// heldToken is a token and how to get the next one.
type heldToken struct {
	token   string
	expires time.Time // zero when not known
	renew   time.Time // when it is time for the next one; zero with expires
	fetch   func(context.Context) (string, error)
	lookup  Lookup // as it was asked
}

type tokenFetch struct {
	work   *sched.Work   // follows that of who waits
	done   chan struct{} // closed when the rest is set
	token  string
	cached bool // it has an end
	err    error
}

func newTokenCache(fetches *atomic.Int64) *tokenCache {
	ctx, cancel := context.WithCancel(context.Background())
	return &tokenCache{
		ctx: ctx, cancel: cancel, fetches: fetches,
		schemes: map[string]auth.Scheme{},
		tokens:  map[tokenKey]heldToken{},
		pending: map[tokenKey]*tokenFetch{},
	}
}

func (c *tokenCache) close() {
	c.mu.Lock()
	c.cancel() // under mu: no fetch starts once close waits
	c.mu.Unlock()
	c.wg.Wait()
}

// attempt remembers in a request's context what it is for and which token it
// was sent with. It is used by the request's goroutine only.
type attempt struct {
	ns     string // see tokenKey
	lookup Lookup
	token  string
	// renewable says that the token may work better when it is fetched again:
	// it is no credential itself, or one from a cache.
	renewable bool
}

type attemptKey struct{}

func (a *attempt) sent(scheme auth.Scheme, token string, cached bool) {
	a.token, a.renewable = token, cached || scheme == auth.SchemeBearer
}

func (a *attempt) key(host string, scheme auth.Scheme, scopes string) tokenKey {
	if scheme == auth.SchemeBearer {
		return tokenKey{host: host, scheme: scheme, ns: a.ns, scopes: scopes}
	}
	return tokenKey{host: host, scheme: scheme, ns: a.ns, repository: a.lookup.Repository}
}

// attemptOf returns the attempt of ctx; for a foreign context it is a new one.
func attemptOf(ctx context.Context) *attempt {
	if a, ok := ctx.Value(attemptKey{}).(*attempt); ok {
		return a
	}
	return &attempt{}
}

// GetScheme implements auth.Cache.
func (c *tokenCache) GetScheme(_ context.Context, host string) (auth.Scheme, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.schemes[host]; ok {
		return s, nil
	}
	return auth.SchemeUnknown, errdefs.ErrNotFound
}

// GetToken implements auth.Cache. A token that has expired is replaced first.
func (c *tokenCache) GetToken(ctx context.Context, host string, scheme auth.Scheme, scopes string) (string, error) {
	a := attemptOf(ctx)
	held, next := c.held(a.key(host, scheme, scopes))
	if next != nil {
		token, err := next.wait(ctx)
		if err != nil {
			return "", errdefs.ErrNotFound // the request is refused, and Set says why
		}
		held.token = token
	}
	if held.token == "" {
		return "", errdefs.ErrNotFound
	}
	a.sent(scheme, held.token, !held.expires.IsZero())
	return held.token, nil
}

// held returns the token of key; without one it is empty. next is the fetch to
// wait for when the token has expired. One that soon will is fetched anew beside.
func (c *tokenCache) held(key tokenKey) (held heldToken, next *tokenFetch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	held = c.tokens[key]
	now := time.Now()
	if held.token == "" || held.renew.IsZero() || now.Before(held.renew) {
		return held, nil
	}
	f, err := c.start(key, held.lookup, held.fetch)
	if now.Before(held.expires) {
		return held, nil
	}
	if err != nil {
		return heldToken{}, nil // closed
	}
	return held, f
}

// Set implements auth.Cache: it is called by a request that was refused.
func (c *tokenCache) Set(ctx context.Context, host string, scheme auth.Scheme, scopes string, fetch func(context.Context) (string, error)) (string, error) {
	a := attemptOf(ctx)
	key := a.key(host, scheme, scopes)
	c.mu.Lock()
	held, ok := c.tokens[key]
	if ok && held.token != a.token {
		c.mu.Unlock()
		a.sent(scheme, held.token, !held.expires.IsZero())
		return held.token, nil
	}
	lookup := a.lookup
	// A bearer token is not the credential, and may just have expired.
	lookup.Refused = ok && scheme == auth.SchemeBasic
	f, err := c.start(key, lookup, fetch)
	c.mu.Unlock()
	if err != nil {
		return "", err
	}
	token, err := f.wait(ctx)
	if ctx.Err() == nil {
		a.sent(scheme, token, f.cached)
	}
	return token, err
}

// wait returns what f brings, or the error of ctx.
func (f *tokenFetch) wait(ctx context.Context) (string, error) {
	defer f.work.Follow(sched.From(ctx))()
	select {
	case <-f.done:
		return f.token, f.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// start returns the fetch under way for key, or begins one.
// Precondition: c.mu is held.
func (c *tokenCache) start(key tokenKey, lookup Lookup, fetch func(context.Context) (string, error)) (*tokenFetch, error) {
	if f, ok := c.pending[key]; ok {
		return f, nil
	}
	if c.ctx.Err() != nil {
		return nil, errClosed
	}
	f := &tokenFetch{work: sched.NewShared(), done: make(chan struct{})}
	c.pending[key] = f
	c.fetches.Add(1)
	c.wg.Go(func() { c.run(key, f, fetch, lookup) })
	return f, nil
}

func (c *tokenCache) run(key tokenKey, f *tokenFetch, fetch func(context.Context) (string, error), lookup Lookup) {
	held := heldToken{fetch: fetch, lookup: lookup}
	held.lookup.Refused = false
	expires := c.look(f, fetch, lookup)
	if credentialRefused(f.err) && !expires.IsZero() && !lookup.Refused {
		// It came from a cache, and may have been changed since.
		lookup.Refused = true
		expires = c.look(f, fetch, lookup)
	}
	if f.err != nil && c.ctx.Err() != nil {
		f.err = errClosed
	}
	held.token, f.cached = f.token, !expires.IsZero()
	held.until(expires, time.Now())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finish(key, held, f.err)
	close(f.done)
}

// look calls fetch for f and returns until when its token is valid. A token waits for no
// turn: a registry that gives out its own may be sending answers for long.
func (c *tokenCache) look(f *tokenFetch, fetch func(context.Context) (string, error), lookup Lookup) time.Time {
	ctx, cancel := context.WithTimeout(sched.With(WithLookup(c.ctx, &lookup), f.work), tokenTimeout)
	defer cancel()
	f.token, f.err = fetch(AtOnce(ctx))
	return lookup.Expires
}

// finish notes how a fetch ended.
// Precondition: c.mu is held.
func (c *tokenCache) finish(key tokenKey, held heldToken, err error) {
	delete(c.pending, key)
	if err != nil {
		old, ok := c.tokens[key]
		switch now := time.Now(); {
		case !ok || old.renew.IsZero():
		case now.Before(old.expires):
			old.renew = now.Add(renewPause)
			c.tokens[key] = old
		default:
			delete(c.tokens, key)
		}
		return
	}
	if len(c.tokens) >= maxTokens {
		clear(c.tokens)
	}
	c.tokens[key] = held
	c.schemes[key.host] = key.scheme
}

// until sets when the token, which came at now, is replaced: after three
// quarters of its life.
func (h *heldToken) until(expires, now time.Time) {
	life := expires.Sub(now)
	if expires.IsZero() || life <= 0 {
		return
	}
	h.expires = expires.Add(-min(life/10, maxMargin))
	h.renew = now.Add(life * 3 / 4)
}

// credentialRefused tells whether err is a token service that does not take a
// credential; see Error.tokenRefused.
func credentialRefused(err error) bool {
	var service *errcode.ErrorResponse
	if !errors.As(err, &service) {
		return false
	}
	switch service.StatusCode {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
		return true
	}
	return false
}
