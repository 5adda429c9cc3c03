package registry

import (
	"context"
	"time"
)

// heldUp is how long nobody may read an answer before its turn is over. It goes on
// without one then: a host has few turns, and who takes nothing of what he is sent, as
// the client of a relay may, would keep them from everybody else.
const heldUp = time.Second

// turn is that of a request at the host that answers it, while its answer is read.
type turn struct {
	end   func()      // of the latest hop of a redirect; nil: there are no turns
	timer *time.Timer // ends it
}

type turnKey struct{}

// idle says that nobody reads the answer until busy is called.
func (t *turn) idle() {
	switch {
	case t == nil || t.end == nil:
	case t.timer == nil:
		t.timer = time.AfterFunc(heldUp, t.end)
	default:
		t.timer.Reset(heldUp)
	}
}

// busy says that the answer is read, or closed.
func (t *turn) busy() {
	if t != nil && t.timer != nil {
		t.timer.Stop()
	}
}

type atOnceKey struct{}

// AtOnce returns a context whose requests wait for no turn of their host. It is for
// small ones whose time is bounded: answers that a host is sending already may take
// longer. Their bytes are waited for like any others.
func AtOnce(ctx context.Context) context.Context { return context.WithValue(ctx, atOnceKey{}, true) }
