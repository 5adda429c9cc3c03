package registry

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"golang.org/x/net/http/httpproxy"
)

const (
	dialTimeout = 10 * time.Second
	tlsTimeout  = 10 * time.Second
	// idlePerHost keeps the connections of a burst of parallel ranges: 16 of
	// the store and the 4 of each of a few streams.
	idlePerHost = 32
	idleTimeout = 90 * time.Second
)

// Loopback tells whether host ("name", "name:port" or "[addr]:port") is this
// machine. Such registries are spoken to in plain HTTP, as Docker does.
func Loopback(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if name == "localhost" {
		return true
	}
	if n := len(name); n > 1 && name[0] == '[' && name[n-1] == ']' {
		name = name[1 : n-1]
	}
	addr, err := netip.ParseAddr(name)
	return err == nil && addr.Unmap().IsLoopback()
}

// PlainHTTPHosts returns a Config.PlainHTTP that is true for the listed hosts
// ("host:port") and for Loopback.
func PlainHTTPHosts(list []string) func(host string) bool {
	list = slices.Clone(list)
	return func(host string) bool { return Loopback(host) || slices.Contains(list, host) }
}

// newTransport returns one that speaks HTTP/2 where it can, unless there is a scheduler:
// with HTTP/1.1 each answer has a connection of its own. What a class of work does not
// read then stays in the sockets of that class, and its sender stops. With HTTP/2 it
// would be up to 4 MiB of each answer, read into memory, and on connections that bring
// more urgent answers, too. Over a link of 200 Mbit/s that ten streams kept full, 64 KiB
// took 11 ms (half of them; 184 ms for 1 %) with HTTP/1.1, 26 ms (1,359 ms) with HTTP/2.
func newTransport(cfg Config) *http.Transport {
	t := &http.Transport{
		DialContext:           boundedDial(cfg.Dial, dialTimeout),
		ForceAttemptHTTP2:     !cfg.Sched.Enabled(),
		TLSHandshakeTimeout:   tlsTimeout,
		ResponseHeaderTimeout: cfg.Stall,
		MaxIdleConnsPerHost:   idlePerHost,
		IdleConnTimeout:       idleTimeout,
		// A connection that lost its peer would hold up all its streams.
		HTTP2: &http.HTTP2Config{SendPingTimeout: cfg.Stall, PingTimeout: dialTimeout},
	}
	if cfg.Dial == nil {
		proxy := httpproxy.FromEnvironment().ProxyFunc()
		t.Proxy = func(req *http.Request) (*url.URL, error) { return proxy(req.URL) }
		t.OnProxyConnectResponse = proxyAnswer
	}
	if cfg.TLS != nil {
		t.TLSClientConfig = cfg.TLS.Clone()
	}
	return t
}

// proxyError is a proxy that does not connect to a registry.
type proxyError struct {
	proxy  string // "host:port"
	status int    // of its answer to CONNECT
}

func (e *proxyError) Error() string {
	return fmt.Sprintf("the proxy %s refuses to connect (HTTP status %d)", e.proxy, e.status)
}

// proxyAnswer implements http.Transport.OnProxyConnectResponse; net/http itself
// would only give the words of the status.
func proxyAnswer(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return &proxyError{proxy: proxy.Host, status: resp.StatusCode}
}

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// boundedDial gives a custom dial the time limit that a net.Dialer has.
func boundedDial(dial dialFunc, timeout time.Duration) dialFunc {
	if dial == nil {
		return (&net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}).DialContext
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		return dial(ctx, network, addr)
	}
}
