package snapshotter

import (
	"context"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// refusedFor is how long the node is not asked again for an image that it could
// not prepare: containerd asks for each layer of it, one after the other.
const refusedFor = time.Minute

// maxRefusals bounds what is remembered.
const maxRefusals = 1024

// refusals remembers which images the node could not prepare.
type refusals struct {
	mu  sync.Mutex
	all map[use]refusal // by reference and manifest; protected by mu
}

type refusal struct {
	err error
	at  time.Time
}

// ask returns the error of a short while ago, or what prepare returns.
func (r *refusals) ask(ctx context.Context, image use, prepare func() ([]digest.Digest, error)) ([]digest.Digest, error) {
	r.mu.Lock()
	old, ok := r.all[image]
	r.mu.Unlock()
	if ok && time.Since(old.at) < refusedFor {
		return nil, old.err
	}
	out, err := prepare()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil || ctx.Err() != nil { // who gave up learned nothing
		delete(r.all, image)
		return out, err
	}
	if r.all == nil || len(r.all) >= maxRefusals {
		r.all = map[use]refusal{}
	}
	r.all[image] = refusal{err, time.Now()}
	return nil, err
}
