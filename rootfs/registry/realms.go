package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// maxRealms bounds the cache; a full one starts again empty.
const maxRealms = 1024

// realmPath is where below a registry its token service seems to be.
const realmPath = "/.tatami/realm/"

// realms lets registries of an internal network have a token service at another
// host of it: GitLab's registry has, and so has any registry behind a mirror on
// this node. The auth client of oras-go refuses to ask at an internal address
// unless the registry's host is the same, since a registry on the Internet could
// make it ask, and get the answer, inside of the network.
//
// The challenge that the auth client sees names a path of the registry instead;
// a request for that path goes to the token service. A challenge that is passed on to
// a caller (WithCaller) stays as it is: he asks himself.
type realms struct {
	closer
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	mu    sync.Mutex
	known map[string]url.URL // by host and path; protected by mu
}

func newRealms(c closer) *realms {
	return &realms{closer: c, lookup: lookupAddr, known: map[string]url.URL{}}
}

// bearerRealm finds the token service in a challenge (distribution
// specification, "Token Authentication").
var bearerRealm = regexp.MustCompile(`(?i)^(bearer\s.*\brealm=")([^"\\]+)"`)

// RoundTrip implements http.RoundTripper.
func (r *realms) RoundTrip(req *http.Request) (*http.Response, error) {
	if service, ok := r.service(req.URL); ok {
		req = req.Clone(req.Context())
		req.URL, req.Host = service, service.Host
	}
	resp, err := r.closer.RoundTrip(req)
	if _, caller := req.Context().Value(callerKey{}).(string); err == nil && resp.StatusCode == http.StatusUnauthorized && !caller {
		r.rename(req, resp.Header)
	}
	return resp, err
}

// service returns the URL at a token service for one that rename made up.
func (r *realms) service(u *url.URL) (*url.URL, bool) {
	if !strings.HasPrefix(u.Path, realmPath) {
		return nil, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	service, ok := r.known[u.Host+u.Path]
	service.RawQuery = u.RawQuery // that of the realm, and more
	return &service, ok
}

// rename puts a path of the registry in the place of a token service that the
// auth client would refuse wrongly.
func (r *realms) rename(req *http.Request, header http.Header) {
	challenge := header.Get("Www-Authenticate")
	at := bearerRealm.FindStringSubmatchIndex(challenge)
	if at == nil {
		return
	}
	realm, err := url.Parse(challenge[at[4]:at[5]])
	if err != nil || realm.Scheme != "https" && (realm.Scheme != "http" || req.URL.Scheme != "http") || !r.internal(req.Context(), req.URL, realm) {
		return
	}
	sum := sha256.Sum256([]byte(realm.String()))
	name := url.URL{Scheme: req.URL.Scheme, Host: req.URL.Host, Path: realmPath + hex.EncodeToString(sum[:]), RawQuery: realm.RawQuery}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) >= maxRealms {
		clear(r.known)
	}
	r.known[name.Host+name.Path] = *realm
	header.Set("Www-Authenticate", challenge[:at[4]]+name.String()+challenge[at[5]:])
}

// internal tells whether a token service is another host of the internal network
// that the host which was asked is in, and the registry, when that is a mirror's.
func (r *realms) internal(ctx context.Context, asked, realm *url.URL) bool {
	if strings.EqualFold(asked.Hostname(), realm.Hostname()) {
		return false
	}
	service, ok := r.inside(ctx, realm.Hostname())
	own, ok2 := r.inside(ctx, asked.Hostname())
	if ns := attemptOf(ctx).ns; ns != "" && ok2 {
		var more []netip.Addr
		more, ok2 = r.inside(ctx, (&url.URL{Host: registryOf(ns)}).Hostname())
		own = append(own, more...)
	}
	// What listens on this machine only is for nobody else to name.
	elsewhere := func(a netip.Addr) bool { return !a.IsLoopback() }
	return ok && ok2 && (!slices.ContainsFunc(own, elsewhere) || !slices.ContainsFunc(service, netip.Addr.IsLoopback))
}

// inside returns the addresses of a host when all of them are internal. Those that
// are link-local (where clouds have their metadata) or of carrier-grade NAT never are.
func (r *realms) inside(ctx context.Context, host string) ([]netip.Addr, bool) {
	list, err := r.lookup(ctx, host)
	outside := func(a netip.Addr) bool { return !a.IsPrivate() && !a.IsLoopback() }
	return list, err == nil && len(list) > 0 && !slices.ContainsFunc(list, outside)
}

// lookupAddr returns the addresses of a host, which may be an address.
func lookupAddr(ctx context.Context, host string) ([]netip.Addr, error) {
	list, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for i := range list {
		list[i] = list[i].Unmap()
	}
	return list, err
}
