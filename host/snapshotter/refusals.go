package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// refusedFor is how long the node is not asked again for an image that it
	// could not prepare: containerd asks for each layer of it, one after the other.
	refusedFor = time.Minute
	// passingFor is how long failures that may pass fail the pull, which the kubelet
	// tries again. After that they count as any other: who has allowed for a
	// fallback gets it.
	passingFor = 2 * time.Minute
	// forgottenAfter is after how long a failure has nothing to do with the next; it
	// is longer than the kubelet's longest pause between two pulls, 5 minutes.
	forgottenAfter = 10 * time.Minute
)

// maxRefusals bounds what is remembered.
const maxRefusals = 1024

// refusals remembers which images the node could not prepare.
type refusals struct {
	mu  sync.Mutex
	all map[use]refusal // by reference and manifest; protected by mu
}

type refusal struct {
	err       error // nil: it may pass, the node is asked again
	since, at time.Time
}

// ask returns what prepare returns, or an error of a short while ago. The error is
// errLazy unless it may pass.
func (r *refusals) ask(ctx context.Context, image use, prepare func() ([]digest.Digest, error)) ([]digest.Digest, error) {
	if err := r.remembered(image); err != nil {
		return nil, errLazy{err}
	}
	out, err := prepare()
	if ctx.Err() != nil { // who gave up learned nothing
		return out, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		delete(r.all, image)
		return out, nil
	}
	return nil, r.note(image, err, time.Now())
}

func (r *refusals) remembered(image use) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.all[image]; time.Since(old.at) < refusedFor {
		return old.err
	}
	return nil
}

// note remembers a failure and returns what to make of it. Precondition: r.mu is
// held.
func (r *refusals) note(image use, err error, now time.Time) error {
	old, ok := r.all[image]
	if !ok || now.Sub(old.at) > forgottenAfter {
		old.since = now
	}
	if r.all == nil || len(r.all) >= maxRefusals {
		r.all = map[use]refusal{}
	}
	if passing(err) && now.Sub(old.since) < passingFor {
		r.all[image] = refusal{since: old.since, at: now}
		return fmt.Errorf("%w; this may pass, pull again (a failure of over %s counts as a reason for the fallback of the settings)", err, passingFor)
	}
	r.all[image] = refusal{err: err, since: old.since, at: now}
	return errLazy{err}
}

// passing says whether what failed may work in a while: a registry that cannot be
// reached, or has enough of us. A full disk does not go away by itself.
func passing(err error) bool {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return false
	}
	return errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err) || errdefs.IsDeadlineExceeded(err)
}
