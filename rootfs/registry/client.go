package registry

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Config says how registries are reached. Its zero value works.
type Config struct {
	// PlainHTTP tells whether a registry ("host:port") speaks HTTP without
	// TLS. Nil means Loopback; see also PlainHTTPHosts.
	PlainHTTP func(host string) bool
	// Credentials returns what to present to a registry; nil is anonymous.
	Credentials auth.CredentialFunc
	// Dial makes connections. Nil dials TCP, through the proxy that the
	// environment names; with Dial no proxy is used.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// TLS is cloned for every connection; nil trusts the system's certificates.
	TLS       *tls.Config
	UserAgent string
	Log       *slog.Logger
	// RetryMax bounds how often a request is sent again; 0 means 4, negative never.
	RetryMax int
	// RetryWait is the pause before the first retry; it doubles with every
	// further one, up to maxBackoff. 0 means 100 ms.
	RetryWait time.Duration
	// Stall is how long an answer may stand still, before its header and
	// between two bytes of its body. 0 means 30 s.
	Stall time.Duration
	// Chunk (bytes) and InFlight are the parallel ranges of Open, which keeps
	// at most Chunk*InFlight bytes in memory. 0 means 8 MiB and 4.
	Chunk    int64
	InFlight int
}

// Client talks to any number of registries, by any number of goroutines.
type Client struct {
	cfg     Config
	log     *slog.Logger
	plain   *http.Client // without credentials: for redirect targets
	auth    *auth.Client
	pushing *auth.Client
	tokens  *tokenCache
	targets targets
	hosts   hosts
	stats   counters
	tagging chan struct{} // holds an element while a list of referrers is written
}

type counters struct {
	requests, retries, bytes, tokens atomic.Int64
}

// Stats counts what a Client has done since New.
type Stats struct {
	Requests int64 // sent to registries and redirect targets, retries included, tokens not
	Retries  int64
	Bytes    int64 // received in bodies
	Tokens   int64 // fetched from token services, and credentials looked up
}

// New returns a Client; it dials nothing.
func New(cfg Config) *Client {
	cfg = cfg.withDefaults()
	c := &Client{cfg: cfg, log: cfg.Log, tagging: make(chan struct{}, 1)}
	c.plain = &http.Client{Transport: newTransport(cfg), CheckRedirect: checkRedirect}
	c.tokens = newTokenCache(&c.stats.tokens)
	c.auth = &auth.Client{
		Client:     c.plain,
		Header:     http.Header{"User-Agent": {cfg.UserAgent}},
		Credential: cfg.Credentials,
		Cache:      c.tokens,
		ClientID:   "tatami",
	}
	c.pushing = c.newPushing()
	return c
}

// maxRedirects is as much as net/http follows by itself.
const maxRedirects = 10

// checkRedirect keeps credentials from going elsewhere. net/http would send
// them on to other ports and subdomains of the host, and over plain HTTP.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if first := via[0].URL; req.URL.Scheme != first.Scheme || req.URL.Host != first.Host {
		req.Header.Del("Authorization")
	}
	return nil
}

func (cfg Config) withDefaults() Config {
	if cfg.PlainHTTP == nil {
		cfg.PlainHTTP = Loopback
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.UserAgent = cmp.Or(cfg.UserAgent, "tatami")
	cfg.RetryMax = cmp.Or(cfg.RetryMax, 4)
	cfg.RetryWait = cmp.Or(cfg.RetryWait, 100*time.Millisecond)
	cfg.Stall = cmp.Or(cfg.Stall, 30*time.Second)
	cfg.Chunk = cmp.Or(cfg.Chunk, 8<<20)
	cfg.InFlight = cmp.Or(cfg.InFlight, 4)
	return cfg
}

// Stats returns the counters.
func (c *Client) Stats() Stats {
	return Stats{
		Requests: c.stats.requests.Load(),
		Retries:  c.stats.retries.Load(),
		Bytes:    c.stats.bytes.Load(),
		Tokens:   c.stats.tokens.Load(),
	}
}

// Close ends token fetches under way and closes idle connections. Requests
// and bodies in use go on until their contexts end.
func (c *Client) Close() error {
	c.tokens.close()
	c.plain.CloseIdleConnections()
	c.pushing.Client.CloseIdleConnections()
	return nil
}

// Repository returns the repository that name means, at the registry that its
// domain names. Tag and digest of name are ignored.
func (c *Client) Repository(name reference.Named) *Repository {
	host := reference.Domain(name)
	if host == "docker.io" {
		// The registry behind Docker's default domain has another name:
		// moby/registry/config.go, DefaultRegistryHost.
		host = "registry-1.docker.io"
	}
	return c.repository(host, name, "")
}

// Mirror returns the repository that name means, asked for at host
// ("host:port") instead of the registry of its domain. As containerd does it,
// the domain travels in the query ("?ns=docker.io"), so that one mirror can
// stand in for many registries; the host's relay is asked in the same way.
func (c *Client) Mirror(host string, name reference.Named) *Repository {
	return c.repository(host, name, reference.Domain(name))
}

func (c *Client) repository(host string, name reference.Named, ns string) *Repository {
	r := &Repository{client: c, host: host, scheme: "https", ns: ns, name: reference.TrimNamed(name)}
	if c.cfg.PlainHTTP(host) {
		r.scheme = "http"
	}
	return r
}
