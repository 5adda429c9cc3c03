package registry

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/http"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

type callerKey struct{}

// WithCaller returns a context for requests on behalf of somebody else: the registry
// itself, and a mirror on this machine, gets exactly his Authorization header, none
// when it is empty, and nothing of Config.Credentials. Other mirrors do not get it.
func WithCaller(ctx context.Context, authorization string) context.Context {
	return context.WithValue(ctx, callerKey{}, authorization)
}

// do sends a request to the repository's host, as the client or as a caller.
func (r *Repository) do(req *http.Request) (*http.Response, error) {
	authorization, ok := req.Context().Value(callerKey{}).(string)
	if !ok || !r.last && !Loopback(r.host) {
		r.link.decorate(req)
		return r.link.auth.Do(req)
	}
	if r.ns != "" {
		r.link.decorate(req) // a registry's own headers may be this node's secrets
	}
	req.Header.Set("User-Agent", r.client.cfg.UserAgent)
	req.Header.Del("Authorization")
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	return r.link.plain.Do(req)
}

// targetKey is under what name the redirect target of a URL is kept: who asked got it,
// which says nothing of what others would.
func targetKey(ctx context.Context, url string) string {
	authorization, ok := ctx.Value(callerKey{}).(string)
	if !ok {
		return url
	}
	sum := sha256.Sum256([]byte(authorization))
	return url + " " + string(sum[:])
}

// Answer is what a registry says to a HEAD request.
type Answer struct {
	Status int
	// Redirected says that the registry sent the request elsewhere: to its storage, or
	// to a page where people log in, which answers 200 to everybody.
	Redirected bool
	// Header has WWW-Authenticate and Retry-After, where they came.
	Header http.Header
	// Descriptor is of the object when Status is 200. Its digest may be empty, and its
	// size is -1, when the registry does not tell.
	Descriptor ocispec.Descriptor
}

// told are the headers of an Answer.
var told = []string{"Www-Authenticate", "Retry-After"}

// Head asks the registry itself, and no mirror, for an object of the kind "manifests"
// or "blobs", once. An error means that it gave no answer.
func (r *Repository) Head(ctx context.Context, kind, ref string) (Answer, error) {
	if err := r.checkRef(ref); err != nil {
		return Answer{}, err
	}
	hosts := r.hosts(CanPull)
	if len(hosts) == 0 {
		return Answer{}, r.fault(kind+" "+ref, errdefs.ErrFailedPrecondition, errors.New("no host serves images"))
	}
	return hosts[len(hosts)-1].head(ctx, query{method: http.MethodHead, kind: kind, ref: ref})
}

func (r *Repository) head(ctx context.Context, q query) (Answer, error) {
	if q.kind == "manifests" {
		q.accept = manifestTypes()
	}
	a := Answer{Header: http.Header{}}
	resp, err := r.exchange(ctx, q, r.url(q), func(req *http.Request) (*http.Response, error) {
		resp, err := r.do(req)
		if err == nil {
			a.note(resp, r.host, q.ref)
		}
		return resp, err
	}, []int{http.StatusOK})
	var e *Error
	if errors.As(err, &e) && e.Status != 0 {
		return a, nil
	}
	if err != nil {
		return Answer{}, err
	}
	return a, resp.Body.Close()
}

func (a *Answer) note(resp *http.Response, host, ref string) {
	a.Status, a.Redirected = resp.StatusCode, resp.Request.Response != nil
	if a.Status != http.StatusOK && resp.Request.URL.Host != host {
		a.Status = http.StatusBadGateway // the storage's answer says nothing of the caller's rights
	}
	for _, name := range told {
		if values := resp.Header.Values(name); len(values) > 0 {
			a.Header[name] = values
		}
	}
	a.Descriptor = ocispec.Descriptor{
		MediaType: mediaType(resp.Header), Size: resp.ContentLength,
		Digest: digest.Digest(resp.Header.Get("Docker-Content-Digest")),
	}
	if d, err := digest.Parse(ref); err == nil {
		a.Descriptor.Digest = d
	} else if a.Descriptor.Digest.Validate() != nil {
		a.Descriptor.Digest = ""
	}
}
