package registry

import (
	"cmp"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Config says how registries are reached. Its zero value works.
type Config struct {
	// PlainHTTP tells whether a registry ("host:port") speaks HTTP without
	// TLS. Nil means Loopback; see also PlainHTTPHosts.
	PlainHTTP func(host string) bool
	// Hosts returns where the repositories of a registry ("docker.io",
	// "host:port") are asked for, in this order; the last one is the registry
	// itself. None is the registry as its name says. The same *Host means the
	// same connections. It is called for each request, by many goroutines.
	Hosts func(registry string) []*Host
	// Credentials returns what to present to a registry; nil is anonymous. Its
	// context tells more: see LookupOf.
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
	// Hedge is how long an answer must stand still at least before the same is
	// asked for a second time, of the next host or over another connection; a host
	// that usually takes long gets longer. 0 means 2 s, negative never.
	Hedge time.Duration
	// Chunk (bytes) and InFlight are the parallel ranges of Open, which keeps
	// at most Chunk*InFlight bytes in memory. 0 means 8 MiB and 4.
	Chunk    int64
	InFlight int
	// Sched says whose requests and bytes come first: it is asked before a request is
	// sent and before bytes are read, for the work of the context (sched.From). Nil lets
	// all pass.
	Sched *sched.Scheduler
}

// Client talks to any number of registries, by any number of goroutines.
type Client struct {
	cfg     Config
	log     *slog.Logger
	own     *link // as Config says
	links   links
	tokens  *tokenCache
	targets targets
	hosts   hosts
	peers   peers
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
	Bytes    int64       // received in bodies
	Tokens   int64       // fetched from token services, and credentials looked up
	Hosts    []HostStats // by name; of maxPeers hosts at most
}

// New returns a Client; it dials nothing.
func New(cfg Config) *Client {
	cfg = cfg.withDefaults()
	c := &Client{cfg: cfg, log: cfg.Log, tagging: make(chan struct{}, 1)}
	c.peers.cfg = cfg
	c.tokens = newTokenCache(&c.stats.tokens)
	c.own = c.newLink(nil)
	return c
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
	cfg.Hedge = cmp.Or(cfg.Hedge, 2*time.Second)
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
		Hosts:    c.peers.stats(),
	}
}

// Close ends token fetches under way and closes idle connections. Requests
// and bodies in use go on until their contexts end.
func (c *Client) Close() error {
	c.tokens.close()
	c.own.close()
	c.links.mu.Lock()
	defer c.links.mu.Unlock()
	for _, l := range c.links.known {
		l.close()
	}
	return nil
}

// Repository returns the repository that name means, at the registry that its
// domain names and at the mirrors that Config.Hosts has for it. Tag and digest
// of name are ignored.
func (c *Client) Repository(name reference.Named) *Repository {
	r := c.registry(name)
	if c.cfg.Hosts != nil {
		r.link = nil // found for each request
	}
	return r
}

// registryOf returns the "host:port" of the registry with this domain. The one
// behind Docker's default domain has another name: moby/registry/config.go,
// DefaultRegistryHost.
func registryOf(domain string) string {
	if domain == "docker.io" {
		return "registry-1.docker.io"
	}
	return domain
}

// registry returns the repository at the registry itself.
func (c *Client) registry(name reference.Named) *Repository {
	return c.repository(registryOf(reference.Domain(name)), name, "")
}

// Mirror returns the repository that name means, asked for at host
// ("host:port") instead of the registry of its domain. As containerd does it,
// the domain travels in the query ("?ns=docker.io"), so that one mirror can
// stand in for many registries; the host's relay is asked in the same way.
func (c *Client) Mirror(host string, name reference.Named) *Repository {
	return c.repository(host, name, reference.Domain(name))
}

func (c *Client) repository(host string, name reference.Named, ns string) *Repository {
	r := &Repository{client: c, link: c.own, host: host, scheme: "https", root: apiRoot, ns: ns, name: reference.TrimNamed(name), last: true}
	if c.cfg.PlainHTTP(host) {
		r.scheme = "http"
	}
	return r
}
