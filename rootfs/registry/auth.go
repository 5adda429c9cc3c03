package registry

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// tokenTimeout bounds one token fetch, whoever waits for it.
const tokenTimeout = 30 * time.Second

// maxTokens bounds the cache; a full one starts again empty.
const maxTokens = 1024

var errClosed = errors.New("the registry client is closed")

// DockerCredentials returns the credentials of Docker's config.json (in
// $DOCKER_CONFIG or ~/.docker), credential helpers included. The file is read
// again whenever a token is needed, so that a new login counts at once; an
// absent file means anonymous access.
func DockerCredentials() auth.CredentialFunc {
	return func(ctx context.Context, host string) (auth.Credential, error) {
		store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
		if err != nil {
			return auth.EmptyCredential, fmt.Errorf("read the credentials of docker's config.json: %w", err)
		}
		return credentials.Credential(store)(ctx, host)
	}
}

// tokenCache is the auth.Cache of a Client. It differs from the one of
// oras-go in two ways. A token is fetched under the cache's own context, so a
// cancelled request does not fail those that wait for the same token. And a
// request that was refused with an old token takes the newer one that another
// request has fetched meanwhile: an expiry costs one fetch.
type tokenCache struct {
	ctx     context.Context // ends with close
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	fetches *atomic.Int64

	mu      sync.Mutex
	schemes map[string]auth.Scheme   // by host; protected by mu
	tokens  map[tokenKey]string      // protected by mu
	pending map[tokenKey]*tokenFetch // protected by mu
}

var _ auth.Cache = (*tokenCache)(nil)

type tokenKey struct {
	host   string
	scheme auth.Scheme
	scopes string
}

type tokenFetch struct {
	done  chan struct{} // closed when token and err are set
	token string
	err   error
}

func newTokenCache(fetches *atomic.Int64) *tokenCache {
	ctx, cancel := context.WithCancel(context.Background())
	return &tokenCache{
		ctx: ctx, cancel: cancel, fetches: fetches,
		schemes: map[string]auth.Scheme{},
		tokens:  map[tokenKey]string{},
		pending: map[tokenKey]*tokenFetch{},
	}
}

func (c *tokenCache) close() {
	c.mu.Lock()
	c.cancel() // under mu: no fetch starts once close waits
	c.mu.Unlock()
	c.wg.Wait()
}

// attempt remembers in a request's context which token the request was sent
// with. It is used by the request's goroutine only.
type attempt struct {
	token  string
	bearer bool
}

type attemptKey struct{}

func (a *attempt) sent(scheme auth.Scheme, token string) {
	a.token, a.bearer = token, scheme == auth.SchemeBearer
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

// GetToken implements auth.Cache.
func (c *tokenCache) GetToken(ctx context.Context, host string, scheme auth.Scheme, scopes string) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	token, ok := c.tokens[tokenKey{host, scheme, scopes}]
	if !ok {
		return "", errdefs.ErrNotFound
	}
	attemptOf(ctx).sent(scheme, token)
	return token, nil
}

// Set implements auth.Cache: it is called by a request that was refused.
func (c *tokenCache) Set(ctx context.Context, host string, scheme auth.Scheme, scopes string, fetch func(context.Context) (string, error)) (string, error) {
	key := tokenKey{host, scheme, scopes}
	a := attemptOf(ctx)
	c.mu.Lock()
	if token, ok := c.tokens[key]; ok && token != a.token {
		c.mu.Unlock()
		a.sent(scheme, token)
		return token, nil
	}
	f, err := c.start(key, fetch)
	c.mu.Unlock()
	if err != nil {
		return "", err
	}
	select {
	case <-f.done:
		a.sent(scheme, f.token)
		return f.token, f.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// start returns the fetch under way for key, or begins one.
// Precondition: c.mu is held.
func (c *tokenCache) start(key tokenKey, fetch func(context.Context) (string, error)) (*tokenFetch, error) {
	if f, ok := c.pending[key]; ok {
		return f, nil
	}
	if c.ctx.Err() != nil {
		return nil, errClosed
	}
	f := &tokenFetch{done: make(chan struct{})}
	c.pending[key] = f
	c.fetches.Add(1)
	c.wg.Go(func() { c.run(key, f, fetch) })
	return f, nil
}

func (c *tokenCache) run(key tokenKey, f *tokenFetch, fetch func(context.Context) (string, error)) {
	ctx, cancel := context.WithTimeout(c.ctx, tokenTimeout)
	defer cancel()
	f.token, f.err = fetch(ctx)
	if f.err != nil && c.ctx.Err() != nil {
		f.err = errClosed
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, key)
	if f.err == nil {
		if len(c.tokens) >= maxTokens {
			clear(c.tokens)
		}
		c.tokens[key] = f.token
		c.schemes[key.host] = key.scheme
	}
	close(f.done)
}
