package registry

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// link is how a host is talked to: its connections and its headers.
type link struct {
	host    *Host        // nil: as Config says
	plain   *http.Client // without credentials: for redirect targets
	auth    *auth.Client
	pushing *auth.Client
}

// maxLinks bounds the cache; a full one starts again empty.
const maxLinks = 1024

// links has the link of each host that was asked, so that connections are used
// again.
type links struct {
	mu    sync.Mutex
	known map[*Host]*link // protected by mu
}

// link returns the link of h, which is made when h is new.
func (c *Client) link(h *Host) *link {
	c.links.mu.Lock()
	defer c.links.mu.Unlock()
	if l, ok := c.links.known[h]; ok {
		return l
	}
	if c.links.known == nil || len(c.links.known) >= maxLinks {
		for _, l := range c.links.known {
			l.close()
		}
		c.links.known = map[*Host]*link{}
	}
	l := c.newLink(h)
	c.links.known[h] = l
	return l
}

// newLink returns the link of h; nil is what Config says of any host.
func (c *Client) newLink(h *Host) *link {
	reading, pushing := c.transports(h)
	l := &link{host: h, plain: &http.Client{Transport: reading, CheckRedirect: redirectCheck(h)}}
	l.auth = &auth.Client{
		Client:     l.plain,
		Header:     http.Header{"User-Agent": {c.cfg.UserAgent}},
		Credential: c.credential,
		Cache:      c.tokens,
		ClientID:   "tatami",
	}
	client := *l.auth
	client.Client = &http.Client{Transport: pushing, CheckRedirect: redirectCheck(h)}
	l.pushing = &client
	return l
}

// transports returns those of Config when h needs no other ones.
func (c *Client) transports(h *Host) (reading, pushing http.RoundTripper) {
	if h != nil && h.direct() {
		return c.own.plain.Transport, c.own.pushing.Client.Transport
	}
	return c.transport(h, c.cfg.Stall), c.transport(h, max(answerTimeout, c.cfg.Stall))
}

// transport makes a transport that waits for answers so long.
func (c *Client) transport(h *Host, wait time.Duration) http.RoundTripper {
	cfg := c.cfg
	if h == nil {
		h = &Host{}
	}
	if h.TLS != nil {
		cfg.TLS = h.TLS
	}
	t := newTransport(cfg)
	t.ResponseHeaderTimeout = wait
	t.DialContext = boundedDial(cfg.Dial, cmp.Or(h.DialTimeout, dialTimeout))
	var rt closer = newLanes(t)
	if h.TLS != nil && (h.TLS.InsecureSkipVerify || len(h.TLS.Certificates) > 0) {
		other := t.Clone()
		other.TLSClientConfig.InsecureSkipVerify, other.TLSClientConfig.Certificates = false, nil
		rt = split{closer: rt, host: h.Name, other: other}
	}
	if h.Upgrade {
		rt = &upgrade{closer: rt, host: h.Name}
	}
	return tokenAnswers{newRealms(paced{rt, &c.peers})}
}

// closer is a transport that has connections.
type closer interface {
	http.RoundTripper
	CloseIdleConnections()
}

// split keeps to one host what is for this host only: certificates of the client,
// and that its own are not verified. Redirects and token services lead elsewhere.
type split struct {
	closer
	host  string
	other closer
}

// RoundTrip implements http.RoundTripper.
func (s split) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Host == s.host {
		return s.closer.RoundTrip(req)
	}
	return s.other.RoundTrip(req)
}

// CloseIdleConnections is for http.Client.
func (s split) CloseIdleConnections() {
	s.closer.CloseIdleConnections()
	s.other.CloseIdleConnections()
}

func (l *link) close() {
	l.plain.CloseIdleConnections()
	l.pushing.Client.CloseIdleConnections()
}

// decorate gives a request to the host what is for this host only.
func (l *link) decorate(req *http.Request) {
	if l.host == nil {
		return
	}
	for name, values := range l.host.Header {
		req.Header[name] = slices.Clone(values)
	}
}

// maxRedirects is as much as net/http follows by itself.
const maxRedirects = 10

// redirectCheck keeps credentials and the headers of h from going elsewhere.
// net/http would send them on to other ports and subdomains of the host, over
// plain HTTP, and again to the host after a detour.
func redirectCheck(h *Host) func(req *http.Request, via []*http.Request) error {
	return func(req *http.Request, via []*http.Request) error {
		if len(via) >= maxRedirects {
			return fmt.Errorf("more than %d redirects", maxRedirects)
		}
		if !strayed(append(via[1:len(via):len(via)], req), via[0]) {
			return nil
		}
		req.Header.Del("Authorization")
		if h != nil {
			for name := range h.Header {
				req.Header.Del(name)
			}
		}
		return nil
	}
}

// strayed tells whether one of hops is at another origin than first.
func strayed(hops []*http.Request, first *http.Request) bool {
	for _, r := range hops {
		if r.URL.Scheme != first.URL.Scheme || r.URL.Host != first.URL.Host {
			return true
		}
	}
	return false
}

// upgrade speaks TLS with a host whose URL says "http", unless the host turns
// out not to. containerd does so for hosts that have settings of TLS
// (core/remotes/docker/resolver.go, NewHTTPFallback).
type upgrade struct {
	closer
	host  string
	plain atomic.Bool // it speaks plain HTTP
}

// RoundTrip implements http.RoundTripper.
func (u *upgrade) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "http" || req.URL.Host != u.host || u.plain.Load() {
		return u.closer.RoundTrip(req)
	}
	secure := req.Clone(req.Context())
	secure.URL.Scheme = "https"
	resp, err := u.closer.RoundTrip(secure)
	var plain tls.RecordHeaderError
	if errors.As(err, &plain) {
		// No handshake, so nothing of the request was sent.
		u.plain.Store(true)
		return u.closer.RoundTrip(req)
	}
	if err == nil {
		resp.Request = req
	}
	return resp, err
}

// maxTokenAnswer bounds the answer of a token service in bytes.
const maxTokenAnswer = 1 << 20

// tokenAnswers notes in the Lookup of a request to a token service how long the
// token is valid, which oras-go does not tell.
type tokenAnswers struct{ closer }

// RoundTrip implements http.RoundTripper.
func (t tokenAnswers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.closer.RoundTrip(req)
	lookup, ok := req.Context().Value(lookupKey{}).(*Lookup)
	if err != nil || !ok || resp.StatusCode != http.StatusOK {
		return resp, err
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenAnswer))
	_ = resp.Body.Close() // it was read, or the error says why not
	if err != nil {
		return nil, err
	}
	lookup.Expires = tokenExpiry(data, time.Now())
	resp.Body = io.NopCloser(bytes.NewReader(data))
	return resp, nil
}

// maxTokenLife bounds what a token service says; a longer time is not looked at.
const maxTokenLife = 30 * 24 * time.Hour

// tokenExpiry returns until when a token is valid that came at now, or the zero
// time when the answer does not say (distribution specification, "Token
// Authentication": expires_in in seconds). issued_at is the clock of another
// machine, so it does not count.
func tokenExpiry(answer []byte, now time.Time) time.Time {
	var doc struct {
		ExpiresIn float64 `json:"expires_in"`
	}
	if json.Unmarshal(answer, &doc) != nil || doc.ExpiresIn <= 0 || doc.ExpiresIn > maxTokenLife.Seconds() {
		return time.Time{}
	}
	return now.Add(time.Duration(doc.ExpiresIn * float64(time.Second)))
}
