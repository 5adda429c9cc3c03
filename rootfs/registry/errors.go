package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

// maxErrorBody bounds what is read of an error answer, bytes.
const maxErrorBody = 16 << 10

// maxErrorText bounds what of a registry's own words gets into an error, bytes.
const maxErrorText = 256

var errStalled = errors.New("no byte came for too long")

// Error is a failed request: what was asked of whom, why it failed and what
// can be done about it.
type Error struct {
	Registry   string // "host:port" that was asked
	Repository string
	Object     string // "manifest latest", "blob sha256:…"
	Status     int    // HTTP status; 0 when there was no answer
	Code       string // first OCI error code of the answer, or ""
	Message    string // the registry's words that go with Code, or ""
	Remedy     string // what the user can do, or ""
	Class      error  // of errdefs
	Err        error  // cause, or nil
	// Before are the failures of the mirrors that were asked before.
	Before []error

	retryAfter time.Duration // what the registry asked for; negative when it did not
	temporary  bool          // worth another try
	refused    bool          // the host has a pause because of it
	stale      bool          // worth one more try: a token or signature may have expired on its way
}

// Error names the object, the cause and the remedy.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s of %s at registry %s: ", e.Object, e.Repository, e.Registry)
	switch {
	case e.Err != nil:
		b.WriteString(e.Err.Error())
	case e.Status != 0:
		fmt.Fprintf(&b, "%s (HTTP status %d)", e.Class, e.Status)
	default:
		b.WriteString(e.Class.Error())
	}
	if e.Code != "" || e.Message != "" {
		fmt.Fprintf(&b, ": %s", strings.TrimSpace(e.Code+" "+e.Message))
	}
	if e.Remedy != "" {
		fmt.Fprintf(&b, " (%s)", e.Remedy)
	}
	for _, before := range e.Before {
		fmt.Fprintf(&b, "; before that: %s", before)
	}
	return b.String()
}

// Unwrap gives the class and the cause.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Class}
	}
	return []error{e.Class, e.Err}
}

// fault is an Error about object, which a caller completes.
func (r *Repository) fault(object string, class, cause error) *Error {
	return &Error{
		Registry: r.host, Repository: r.Name(), Object: object,
		Class: class, Err: cause, retryAfter: -1,
	}
}

// dataLoss is an Error for an answer that is not what it says.
func (r *Repository) dataLoss(object, format string, args ...any) *Error {
	return r.fault(object, errdefs.ErrDataLoss, fmt.Errorf(format, args...))
}

// statusError turns an answer with an unwanted status into an Error. It reads
// the body under a limit and closes it.
func (r *Repository) statusError(object string, resp *http.Response) *Error {
	defer resp.Body.Close()
	e := r.fault(object, nil, nil)
	e.Status = resp.StatusCode
	e.Remedy, e.Class = r.classify(resp.StatusCode)
	e.temporary = temporaryStatus(resp.StatusCode)
	if resp.Request.URL.Host != r.host {
		e.stale = resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden
	}
	e.retryAfter = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	e.refused = refusal(resp)
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // the status alone is an answer too
	e.Code, e.Message = parseErrorBody(body)
	return e
}

// parseErrorBody returns the first error of an OCI error body, and empty
// strings for any other body.
func parseErrorBody(body []byte) (code, message string) {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &doc) != nil || len(doc.Errors) == 0 {
		return "", ""
	}
	return clean(doc.Errors[0].Code), clean(doc.Errors[0].Message)
}

// clean makes text of a registry fit for one line of a log.
func clean(s string) string {
	s = strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, s)
	if len(s) > maxErrorText {
		s = s[:maxErrorText]
	}
	return strings.ToValidUTF8(s, "")
}

func temporaryStatus(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests,
		http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

func (r *Repository) classify(status int) (remedy string, class error) {
	switch status {
	case http.StatusUnauthorized:
		return r.loginRemedy(), errdefs.ErrUnauthenticated
	case http.StatusForbidden:
		return "do the credentials for " + r.host + " allow to pull this repository?", errdefs.ErrPermissionDenied
	case http.StatusNotFound, http.StatusGone:
		return "check the name and the tag; was it pushed to this registry?", errdefs.ErrNotFound
	case http.StatusRequestedRangeNotSatisfiable:
		return "", errdefs.ErrOutOfRange
	case http.StatusProxyAuthRequired:
		return proxyLogin, errdefs.ErrFailedPrecondition
	case http.StatusTooManyRequests:
		return "the registry limits requests: log in, wait, or use a mirror", errdefs.ErrResourceExhausted
	case http.StatusNotImplemented, http.StatusMethodNotAllowed:
		return "", errdefs.ErrNotImplemented
	case http.StatusBadRequest:
		if r.scheme == "http" {
			// Go's and nginx's answer to HTTP on a TLS port.
			return "if " + r.host + " speaks HTTPS, take it out of plain_http", errdefs.ErrInvalidArgument
		}
		return "", errdefs.ErrInvalidArgument
	}
	return "", errdefs.ErrUnavailable
}

func (r *Repository) loginRemedy() string {
	if r.client.cfg.Credentials == nil {
		return "no credentials are configured for " + r.host + "; a repository that does not exist may be answered like this, too"
	}
	return "were the right credentials given for " + r.host + "? A repository that does not exist may be answered like this, too"
}

// sendError turns a request that got no answer into an Error. When the request's
// context has ended, retry puts the context's error in its place.
func (r *Repository) sendError(object string, err error) error {
	var sent *url.Error
	lost := errors.As(err, &sent) // and not refused before it was sent
	err = redact(err)
	e := r.fault(object, errdefs.ErrUnavailable, err)
	var service *errcode.ErrorResponse
	var pause *pauseError
	var certificate *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var proxy *proxyError
	var dial *net.OpError
	switch {
	case errors.As(err, &pause):
		e.Class, e.temporary, e.retryAfter = errdefs.ErrResourceExhausted, true, pause.asked
	case errors.As(err, &proxy):
		e.proxyRefused(proxy)
	case errors.As(err, &dial) && dial.Op == "proxyconnect": // net/http's word
		e.temporary = true
		e.Err = opaque(err)
		e.Remedy = "is the proxy that HTTP_PROXY or HTTPS_PROXY names reachable from this node?"
	case errors.Is(err, http.ErrSchemeMismatch):
		e.Class = errdefs.ErrFailedPrecondition
		e.Remedy = fmt.Sprintf("the registry speaks plain HTTP, not HTTPS: set plain_http = [%q]", r.host)
	case errors.As(err, &certificate), errors.As(err, &authority):
		e.Class = errdefs.ErrFailedPrecondition
		e.Remedy = "add the authority that signed the registry's certificate to those that this node trusts"
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		e.Class, e.Err, e.Remedy = errdefs.ErrUnauthenticated, nil, r.loginRemedy()
	case errors.As(err, &service):
		e.tokenRefused(r, service)
	case lost || errors.Is(err, context.DeadlineExceeded):
		e.temporary = true
		e.Err = opaque(err)
		e.Remedy = fmt.Sprintf("is the registry reachable from this node? for a plain HTTP registry set plain_http = [%q]", r.host)
	}
	return e
}

const proxyLogin = "the proxy wants credentials: write them into HTTP_PROXY and HTTPS_PROXY, http://user:password@proxy:port"

// proxyRefused completes e with what a proxy answered to CONNECT. Tinyproxy says
// 401 to a wrong password.
func (e *Error) proxyRefused(err *proxyError) {
	e.Status = err.status
	switch err.status {
	case http.StatusProxyAuthRequired, http.StatusUnauthorized:
		e.Class, e.Remedy = errdefs.ErrFailedPrecondition, proxyLogin
	case http.StatusForbidden, http.StatusMethodNotAllowed:
		e.Class = errdefs.ErrFailedPrecondition
		e.Remedy = "allow " + e.Registry + " and its port in the rules of the proxy, or add it to NO_PROXY"
	default:
		e.temporary = true
		e.Remedy = "is the registry reachable from the proxy? if it is to be reached without one, add it to NO_PROXY"
	}
}

// tokenRefused completes e with what the token service answered. 400 counts as
// refused credentials, as some services answer it (Azure's, for a bad refresh token).
func (e *Error) tokenRefused(r *Repository, service *errcode.ErrorResponse) {
	e.Status = service.StatusCode
	e.Remedy, e.Class = r.classify(service.StatusCode)
	e.temporary = temporaryStatus(service.StatusCode)
	if service.StatusCode == http.StatusBadRequest || service.StatusCode == http.StatusForbidden {
		e.Class, e.Remedy = errdefs.ErrUnauthenticated, r.loginRemedy()
	}
	host := ""
	if service.URL != nil {
		host = service.URL.Host
	}
	e.Err = fmt.Errorf("token service %s answers HTTP status %d", host, service.StatusCode)
	if len(service.Errors) > 0 {
		e.Code, e.Message = clean(service.Errors[0].Code), clean(service.Errors[0].Message)
	}
}

// opaque hides that err is about a context or a timeout inside of this package:
// the caller would take it for the end of its own context.
func opaque(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return errors.New(err.Error())
	}
	return err
}

// redact removes URLs from err: the query of a redirect target is a secret.
// The auth client and net/http both put them in front of the cause.
func redact(err error) error {
	var u *url.Error
	if !errors.As(err, &u) {
		return err
	}
	inner := redact(u.Err)
	target, parseErr := url.Parse(u.URL)
	if parseErr != nil {
		return inner
	}
	return fmt.Errorf("%s %s: %w", u.Op, target.Host, inner)
}
