package registry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// query is one request to a registry, apart from the repository.
type query struct {
	method string
	kind   string // "manifests", "blobs", "referrers", "segments"
	ref    string // tag or digest
	values url.Values
	accept []string
	ranges string // value of a Range header, or ""
}

// object is how errors name what is asked for.
func (q query) object() string {
	return map[string]string{
		"manifests": "manifest ", "blobs": "blob ", "referrers": "referrers of ", "segments": "segment ",
	}[q.kind] + q.ref
}

func (r *Repository) url(q query) string {
	values := url.Values{}
	for k, v := range q.values {
		values[k] = v
	}
	if r.ns != "" {
		values.Set("ns", r.ns)
	}
	u := url.URL{Scheme: r.scheme, Host: r.host, Path: r.root + "/" + r.path() + "/" + q.kind + "/" + q.ref, RawQuery: values.Encode()}
	return u.String()
}

// attempt returns that of a request to this host.
func (r *Repository) attempt() *attempt {
	if r.ns == "" {
		return &attempt{lookup: Lookup{Repository: r.Name()}}
	}
	a := &attempt{ns: r.ns, lookup: Lookup{Repository: r.host + "/" + r.path()}}
	if Loopback(r.host) {
		a.lookup.registry, a.lookup.name = registryOf(r.ns), r.Name()
	}
	return a
}

// send makes one request with the registry's credentials and follows
// redirects, without them to other hosts. An answer with a status that is not
// in want becomes an *Error. The answer's body watches for stalls.
func (r *Repository) send(ctx context.Context, q query, want ...int) (*http.Response, error) {
	a := r.attempt()
	ctx = context.WithValue(ctx, attemptKey{}, a)
	ctx = auth.AppendScopesForHost(ctx, r.host, auth.ScopeRepository(r.path(), auth.ActionPull))
	resp, err := r.exchange(ctx, q, r.url(q), r.do, want)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusUnauthorized && a.renewable {
		e.stale = true
	}
	return resp, err
}

// sendTo is send to a redirect target.
func (r *Repository) sendTo(ctx context.Context, q query, target string, want ...int) (*http.Response, error) {
	return r.exchange(ctx, q, target, func(req *http.Request) (*http.Response, error) {
		req.Header.Set("User-Agent", r.client.cfg.UserAgent)
		return r.link.plain.Do(req)
	}, want)
}

func (r *Repository) exchange(ctx context.Context, q query, address string, do func(*http.Request) (*http.Response, error), want []int) (*http.Response, error) {
	reqCtx, cancel := context.WithCancelCause(ctx)
	turn := new(turn)
	reqCtx = context.WithValue(reqCtx, turnKey{}, turn)
	req, err := http.NewRequestWithContext(reqCtx, q.method, address, nil)
	if err != nil {
		cancel(nil)
		return nil, r.sendError(q.object(), err)
	}
	req.Header["Accept"] = q.accept
	// A transfer that is compressed has no ranges of the blob.
	req.Header.Set("Accept-Encoding", "identity")
	if q.ranges != "" {
		req.Header.Set("Range", q.ranges)
	}
	prioritise(ctx, req.Header)
	r.client.stats.requests.Add(1)
	resp, err := do(req)
	if err != nil {
		cancel(nil)
		return nil, r.sendError(q.object(), err)
	}
	b := newBody(resp.Body, r.client.cfg.Stall, cancel, &r.client.stats.bytes)
	b.allowance = newAllowance(reqCtx, r.client.cfg.Sched, resp)
	b.turn = turn
	turn.idle()
	resp.Body = b
	if !slices.Contains(want, resp.StatusCode) {
		return nil, r.statusError(q.object(), resp)
	}
	return resp, nil
}

// body is the body of an answer. A Read that gets nothing for the stall time
// ends the request and fails with errStalled; the time that the reader takes
// between Reads does not count, nor does that until it is its turn.
type body struct {
	io.ReadCloser
	allowance *allowance // nil: not scheduled
	turn      *turn      // nil: not scheduled
	stall     time.Duration
	timer     *time.Timer
	stalled   atomic.Bool
	cancel    context.CancelCauseFunc
	count     *atomic.Int64
}

func newBody(rc io.ReadCloser, stall time.Duration, cancel context.CancelCauseFunc, count *atomic.Int64) *body {
	b := &body{ReadCloser: rc, stall: stall, cancel: cancel, count: count}
	b.timer = time.AfterFunc(stall, func() {
		b.stalled.Store(true)
		cancel(errStalled)
	})
	b.timer.Stop()
	return b
}

func (b *body) Read(p []byte) (int, error) {
	b.turn.busy()
	defer b.turn.idle()
	n, err := b.allowance.read(p, func() { b.timer.Reset(b.stall) }, b.ReadCloser.Read)
	b.timer.Stop()
	b.count.Add(int64(n))
	if err != nil && !errors.Is(err, io.EOF) && b.stalled.Load() {
		err = errStalled
	}
	return n, err
}

func (b *body) Close() error {
	b.timer.Stop()
	b.turn.busy()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
