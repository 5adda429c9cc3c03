package registry

import (
	"context"
	"io"
	"slices"
	"sync"
	"time"
)

// wrongFor is how long a mirror is not asked for a repository of which it gave wrong
// bytes: what it keeps does not get better by itself soon. Other repositories are not
// concerned. Whoever writes a wrong index of an image finds all bytes wrong, and could
// take the mirror from everybody.
const wrongFor = 5 * time.Minute

// Trail notes which hosts gave the bytes that ranges and streams under one context
// brought, so that whoever finds them wrong can say so.
type Trail struct {
	mu     sync.Mutex
	givers []giver // protected by mu
}

// giver is a host and what it gave bytes of.
type giver struct {
	at   *Repository
	blob string // targetKey of it
}

type trailKey struct{}

// WithTrail returns a context for ranges and streams whose hosts are noted.
func WithTrail(ctx context.Context) (context.Context, *Trail) {
	t := &Trail{}
	return context.WithValue(ctx, trailKey{}, t), t
}

// note adds who gives bytes of p from now on.
func note(ctx context.Context, at *Repository, p piece) {
	t, ok := ctx.Value(trailKey{}).(*Trail)
	if !ok {
		return
	}
	g := giver{at, targetKey(ctx, at.url(p.query()))}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.ContainsFunc(t.givers, func(old giver) bool { return old.at.host == at.host && old.blob == g.blob }) {
		t.givers = append(t.givers, g)
	}
}

// Blame says that bytes which came under the trail's context were wrong: mirrors
// that gave some are left alone for a while, and redirect targets forgotten. It
// tells whether somebody else is asked for the same from now on. What was noted is
// forgotten.
func (t *Trail) Blame(err error) (elsewhere bool) {
	t.mu.Lock()
	givers := t.givers
	t.givers = nil
	t.mu.Unlock()
	for _, g := range givers {
		g.at.client.targets.forget(g.blob, g.at.client.targets.get(g.blob))
		elsewhere = g.at.wrong(err) || elsewhere
	}
	return elsewhere
}

// wrong notes that a host gave wrong bytes, and tells whether it is not asked from
// now on.
func (r *Repository) wrong(err error) bool {
	r.client.peers.get(r.host).wrong.Add(1)
	log := r.client.log.With("registry", r.host, "repository", r.Name(), "error", err)
	if r.last {
		log.Warn("the registry gave wrong bytes")
		return false
	}
	log.Warn("a mirror gave wrong bytes, the next host is asked", "again", wrongFor)
	r.client.hosts.set(r.place(), func(s *hostState) { s.down = time.Now().Add(wrongFor) })
	return true
}

// Trailed opens a body that is made from ranges, and that can be blamed for wrong
// bytes: its method Blame is that of the Trail of the context which open gets.
func Trailed(ctx context.Context, open func(context.Context) (io.ReadCloser, error)) (io.ReadCloser, error) {
	ctx, trail := WithTrail(ctx)
	body, err := open(ctx)
	if err != nil {
		return nil, err
	}
	return trailed{body, trail}, nil
}

type trailed struct {
	io.ReadCloser
	*Trail
}
