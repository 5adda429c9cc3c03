package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// answerTimeout bounds how long a registry may take for its answer once a
// request that pushes was sent: some copy the whole blob then.
const answerTimeout = 5 * time.Minute

// write is a request with a token that allows to push.
type write struct {
	method  string
	address *url.URL
	object  string // for errors
	accept  []string

	mediaType string    // of the body, or ""
	data      []byte    // the body, or
	stream    io.Reader // the body
	size      int64     // of stream in bytes; -1 when not known

	session       bool            // it goes on with an upload
	authorization string          // header of the request that began the upload, or ""
	from          reference.Named // another repository that is to be read, or nil
}

// origin returns a URL below this repository at its registry.
func (r *Repository) origin(q query) *url.URL {
	u, err := url.Parse(r.url(q))
	if err != nil {
		panic(fmt.Sprintf("parse a URL that was built here: %v", err)) // names and digests were checked
	}
	return u
}

func (r *Repository) scopes(w write) []string {
	s := []string{auth.ScopeRepository(r.path(), auth.ActionPull, auth.ActionPush)}
	if w.from != nil {
		s = append(s, auth.ScopeRepository(reference.Path(w.from), auth.ActionPull))
	}
	return s
}

// write sends w. An answer with a status that is not in want becomes an
// *Error; a stream that fails itself a *sourceError.
func (r *Repository) write(ctx context.Context, w write, want ...int) (*http.Response, error) {
	a := r.attempt()
	ctx = context.WithValue(ctx, attemptKey{}, a)
	ctx = auth.AppendScopesForHost(ctx, r.host, r.scopes(w)...)
	ctx, cancel := context.WithCancelCause(ctx)
	req, up, err := r.newWrite(ctx, w, cancel)
	if err != nil {
		cancel(nil)
		return nil, r.sendError(w.object, err)
	}
	r.client.stats.requests.Add(1)
	resp, err := r.doWrite(req)
	if source := up.stop(); source != nil {
		cancel(nil)
		if err == nil {
			_ = resp.Body.Close() // the answer is to half a blob
		}
		return nil, &sourceError{source}
	}
	if err != nil {
		cancel(nil)
		if up.stalled.Load() {
			return nil, r.bodyError(w.object, fmt.Errorf("send: %w", errStalled))
		}
		return nil, r.sendError(w.object, err)
	}
	resp.Body = newBody(resp.Body, r.client.cfg.Stall, cancel, &r.client.stats.bytes)
	if !slices.Contains(want, resp.StatusCode) {
		return nil, r.writeError(w, resp, a)
	}
	return resp, nil
}

func (r *Repository) newWrite(ctx context.Context, w write, cancel context.CancelCauseFunc) (*http.Request, *upload, error) {
	up := newUpload(w.stream, r.client.cfg.Stall, cancel)
	req, err := http.NewRequestWithContext(ctx, w.method, w.address.String(), bytes.NewReader(w.data))
	if err != nil {
		return nil, nil, err
	}
	if w.stream != nil {
		req.Body, req.GetBody, req.ContentLength = up, nil, w.size
	}
	if w.mediaType != "" {
		req.Header.Set("Content-Type", w.mediaType)
	}
	if w.authorization != "" && r.own(w.address) {
		req.Header.Set("Authorization", w.authorization)
	}
	req.Header["Accept"] = w.accept
	req.Header.Set("User-Agent", r.client.cfg.UserAgent)
	return req, up, nil
}

// own tells whether a URL, which the registry may have given, is at the
// registry: elsewhere its credentials must not go.
func (r *Repository) own(u *url.URL) bool { return u.Scheme == r.scheme && u.Host == r.host }

func (r *Repository) doWrite(req *http.Request) (*http.Response, error) {
	if r.own(req.URL) {
		r.link.decorate(req)
		return r.link.pushing.Do(req)
	}
	return r.link.pushing.Client.Do(req)
}

// writeError is statusError with the remedies of pushing.
func (r *Repository) writeError(w write, resp *http.Response, a *attempt) *Error {
	e := r.statusError(w.object, resp)
	switch e.Status {
	case http.StatusUnauthorized:
		e.stale = e.stale || a.renewable || w.authorization != ""
	case http.StatusForbidden, http.StatusMethodNotAllowed:
		e.Class = errdefs.ErrPermissionDenied
		e.Remedy = "do the credentials for " + r.host + " allow to push to this repository, and does the registry take pushes?"
	case http.StatusRequestEntityTooLarge:
		e.Class = errdefs.ErrResourceExhausted
		e.Remedy = "the registry, or a proxy in front of it, takes nothing that large"
	case http.StatusNotFound:
		if w.session {
			e.stale, e.Remedy = true, "the registry has forgotten the upload"
		}
	}
	return e
}

// sourceError is the failure of what was to be pushed, not of the registry.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

// upload is the body of a request. The transport reads it in a goroutine that
// may outlive the request, so after stop it does not touch its reader. Between
// two reads, that is while bytes are being sent, it watches for stalls.
type upload struct {
	stall   time.Duration
	timer   *time.Timer
	stalled atomic.Bool

	mu      sync.Mutex
	r       io.Reader // protected by mu
	stopped bool      // protected by mu
	err     error     // of r; protected by mu
}

func newUpload(r io.Reader, stall time.Duration, cancel context.CancelCauseFunc) *upload {
	u := &upload{r: r, stall: stall}
	u.timer = time.AfterFunc(stall, func() {
		u.stalled.Store(true)
		cancel(errStalled)
	})
	u.timer.Stop()
	return u
}

func (u *upload) Read(p []byte) (int, error) {
	u.timer.Stop()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.stopped {
		return 0, errors.New("read of an upload that has ended")
	}
	n, err := u.r.Read(p)
	switch {
	case err == nil:
		u.timer.Reset(u.stall)
	case !errors.Is(err, io.EOF):
		u.err = err
	}
	return n, err
}

// Close is for the transport. The reader belongs to the caller.
func (u *upload) Close() error { return nil }

// stop waits for a read under way and returns what failed in the reader.
func (u *upload) stop() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.timer.Stop()
	u.stopped = true
	return u.err
}
