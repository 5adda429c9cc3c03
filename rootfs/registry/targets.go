package registry

import (
	"sync"
	"time"
)

const (
	// targetAge is how long a redirect target is used without asking the
	// registry again. Targets are signed for 5 minutes (Harbor, Quay) to an
	// hour; a target that expires earlier is noticed when it is refused.
	targetAge  = 10 * time.Minute
	maxTargets = 4096
)

// targets remembers where a registry redirects the requests for a blob, so
// that a range costs one request and not two.
type targets struct {
	mu    sync.Mutex
	known map[string]target // by targetKey of the registry's URL of the blob; protected by mu
}

type target struct {
	url     string // may hold a signature: never log it
	learned time.Time
}

// get returns the target for blob, or "".
func (t *targets) get(blob string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	known := t.known[blob]
	if time.Since(known.learned) > targetAge {
		delete(t.known, blob)
		return ""
	}
	return known.url
}

func (t *targets) put(blob, url string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known == nil || len(t.known) >= maxTargets {
		t.known = map[string]target{}
	}
	t.known[blob] = target{url: url, learned: time.Now()}
}

// forget drops the target of blob unless another request has replaced it.
func (t *targets) forget(blob, url string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known[blob].url == url {
		delete(t.known, blob)
	}
}
