package mirror

import (
	"crypto/tls"
	"net"
	"sync"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// hosts is a Config.Hosts of a registry.Client.
type hosts = func(registry string) []*registry.Host

// Others leaves the mirror at address ("127.0.0.1:5055") out of what hosts.toml says:
// containerd is led here by the files that the node itself reads.
func Others(address string, next hosts) hosts {
	if address == "" || next == nil {
		return next
	}
	return func(name string) []*registry.Host {
		list := next(name)
		kept := make([]*registry.Host, 0, len(list))
		for _, h := range list {
			if !isMirror(address, h.Name) {
				kept = append(kept, h)
			}
		}
		return kept
	}
}

// isMirror tells whether host ("name:port") is the mirror at address: whatever this
// machine is called, the port counts.
func isMirror(address, host string) bool {
	_, own, err := net.SplitHostPort(address)
	_, port, herr := net.SplitHostPort(host)
	return err == nil && herr == nil && port == own && registry.Loopback(host)
}

// maxHosts bounds what WithoutCertificates remembers; a full table starts again empty.
const maxHosts = 1024

// WithoutCertificates has no client certificates: they are the node's, not the callers'.
func WithoutCertificates(next hosts) hosts {
	if next == nil {
		return nil
	}
	var mu sync.Mutex
	bare := map[*registry.Host]*registry.Host{} // protected by mu
	return func(name string) []*registry.Host {
		mu.Lock()
		defer mu.Unlock()
		if len(bare) > maxHosts {
			clear(bare)
		}
		var list []*registry.Host
		for _, h := range next(name) {
			if bare[h] == nil {
				bare[h] = strip(h)
			}
			list = append(list, bare[h])
		}
		return list
	}
}

func strip(h *registry.Host) *registry.Host {
	if h.TLS == nil || len(h.TLS.Certificates) == 0 {
		return h
	}
	out := *h
	out.TLS = h.TLS.Clone()
	out.TLS.Certificates = []tls.Certificate{}
	return &out
}
