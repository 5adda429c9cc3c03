package kube

import (
	"context"
	"time"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

// Age makes the cached answers of a source older.
func Age(s credentials.Source, by time.Duration) {
	for _, p := range s.(providers) {
		p.mu.Lock()
		for key, a := range p.cache {
			a.made, a.expires = a.made.Add(-by), a.expires.Add(-by)
			p.cache[key] = a
		}
		p.mu.Unlock()
	}
}

// WithLookup returns a context as the client's lookups have it.
func WithLookup(ctx context.Context, repository string, refused bool) context.Context {
	return registry.WithLookup(ctx, &registry.Lookup{Repository: repository, Refused: refused})
}
