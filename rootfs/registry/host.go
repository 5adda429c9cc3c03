package registry

import (
	"crypto/tls"
	"net/http"
	"time"
)

// Capabilities are what a Host may be asked for, and so what it is trusted with
// (containerd core/remotes/docker/registry.go, HostCapabilities).
type Capabilities uint8

// The capabilities of a host.
const (
	CanPull      Capabilities = 1 << iota // manifests and blobs by digest
	CanResolve                            // manifests by tag: its word counts
	CanPush                               // uploads
	CanReferrers                          // lists of referrers
)

// CanAll is what a host can that does not say.
const CanAll = CanPull | CanResolve | CanPush | CanReferrers

// Has tells whether all of want are there.
func (c Capabilities) Has(want Capabilities) bool { return c&want == want }

// Host is one place where the repositories of a registry can be asked for: a
// mirror, or the registry itself. It does not change.
type Host struct {
	Name   string // "host:port"
	Scheme string // "http" or "https"
	// Path is the root of the API: "/v2" as the distribution specification has it.
	Path         string
	Capabilities Capabilities
	// Header goes with requests to this host: to no other one, not to its token
	// service, not along with a redirect to elsewhere. It may hold secrets.
	Header http.Header
	// TLS takes the place of Config.TLS; nil does not.
	TLS *tls.Config
	// Upgrade has a host with Scheme "http" asked over TLS first.
	Upgrade bool
	// DialTimeout bounds the making of a connection; 0 means dialTimeout.
	DialTimeout time.Duration
}

// direct tells whether requests need nothing but the connections of Config.
func (h *Host) direct() bool { return h.TLS == nil && !h.Upgrade && h.DialTimeout == 0 }
