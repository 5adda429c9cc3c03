package credentials

import (
	"context"
	"sync"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

const (
	// candidateLife is how long a chosen credential counts before its source is asked
	// again: it may have changed there.
	candidateLife = time.Hour
	// refusedFor is how long a credential that a registry has refused comes after
	// the others. It is no judgement: a token service that is out of order refuses
	// everybody.
	refusedFor = time.Minute
	// maxCandidates bounds what is remembered; when full it starts again empty.
	maxCandidates = 1024
)

// Candidates chooses where a source has more than one credential for a repository
// and nothing says which is right, as with the pull secrets of a whole cluster: the
// first that was not refused lately. Its zero value is ready.
type Candidates struct {
	mu      sync.Mutex
	given   map[string]auth.Credential // last, by repository; protected by mu
	refused map[refusal]time.Time      // protected by mu
}

type refusal struct {
	repository string
	credential auth.Credential
}

// Choose returns one of list for a repository. When the last one of them has just been
// refused it is the empty one: another source may do better. A later lookup gets them
// again, the one first that was refused the longest ago: not every refusal is meant.
func (c *Candidates) Choose(ctx context.Context, repository string, list []auth.Credential) auth.Credential {
	lookup := registry.LookupOf(ctx)
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bound()
	if last, ok := c.given[repository]; ok && lookup.Refused {
		c.refused[refusal{repository, last}] = now
	}
	best := c.pick(repository, list, now, !lookup.Refused)
	if best == auth.EmptyCredential {
		delete(c.given, repository)
		return best
	}
	c.given[repository] = best
	lookup.Expires = now.Add(candidateLife)
	return best
}

// pick returns the first of list that was not refused lately, or else, if again, the one
// that was refused the longest ago; or the empty one.
// Precondition: c.mu is held.
func (c *Candidates) pick(repository string, list []auth.Credential, now time.Time, again bool) auth.Credential {
	best, oldest := auth.EmptyCredential, now
	for _, cred := range list {
		if cred == auth.EmptyCredential {
			continue
		}
		last, ok := c.refused[refusal{repository, cred}]
		if !ok || now.Sub(last) >= refusedFor {
			return cred
		}
		if again && last.Before(oldest) {
			best, oldest = cred, last
		}
	}
	return best
}

// Trust makes a credential count again that was refused: it is known to be good now.
func (c *Candidates) Trust(repository string, cred auth.Credential) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.refused, refusal{repository, cred})
}

// bound keeps what is remembered small.
// Precondition: c.mu is held.
func (c *Candidates) bound() {
	if c.given == nil || len(c.given) >= maxCandidates {
		c.given = map[string]auth.Credential{}
	}
	if c.refused == nil || len(c.refused) >= maxCandidates {
		c.refused = map[refusal]time.Time{}
	}
}
