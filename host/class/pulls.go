package class

import (
	"maps"
	"slices"
	"sync"

	"github.com/distribution/reference"
)

// Pulls are the pulls under way of which it is known for which pod they are. The
// zero value is ready.
type Pulls struct {
	mu   sync.Mutex
	next int                     // protected by mu
	by   map[string]map[int]Pull // by reference, and in the order in which they began; protected by mu
}

// Pull is for one pod.
type Pull struct {
	Pod   string // its UID
	Facts Facts
}

// Begin notes the pull of a reference until end is called.
func (p *Pulls) Begin(ref string, pull Pull) (end func()) {
	ref = normal(ref)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	id := p.next
	if p.by == nil {
		p.by = map[string]map[int]Pull{}
	}
	if p.by[ref] == nil {
		p.by[ref] = map[int]Pull{}
	}
	p.by[ref][id] = pull
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.by[ref], id)
		if len(p.by[ref]) == 0 {
			delete(p.by, ref)
		}
	}
}

// Of lists the pulls of a reference, the first that began first.
func (p *Pulls) Of(ref string) (out []Pull) {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.by[normal(ref)]
	for _, id := range slices.Sorted(maps.Keys(all)) {
		out = append(out, all[id])
	}
	return out
}

// normal is a reference as containerd's CRI calls the image that it pulls
// (internal/cri/server/images/image_pull.go).
func normal(ref string) string {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return ref
	}
	return named.String()
}
