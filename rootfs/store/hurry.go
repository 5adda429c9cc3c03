package store

import (
	"context"
	"errors"
	"time"
)

// Fixed is a Source of which the store does not expect that its requests get more
// urgent when the fetches do that they are made for (sched.From): it told somebody else
// of the rank when it asked.
type Fixed interface {
	// FixedRank says whether that is so.
	FixedRank() bool
}

// hurryAfter is how long a reader waits for a request that was made for who can wait.
// Mostly it is soon there, and to ask anew costs a connection and what is on its way.
const hurryAfter = 100 * time.Millisecond

// errHurry ends a request that is to be made anew.
var errHurry = errors.New("somebody waits for it now")

// asks notes that a request of src is about to be made, which cancel ends.
func (f *fetch) asks(src *source, cancel context.CancelCauseFunc) {
	fixed, ok := src.Source.(Fixed)
	if !ok || !fixed.FixedRank() {
		return
	}
	f.v.seg.mu.Lock()
	defer f.v.seg.mu.Unlock()
	f.asked, f.again = f.work.Standing().Rank, cancel
}

// answered notes that a request has ended.
func (f *fetch) answered() {
	f.v.seg.mu.Lock()
	defer f.v.seg.mu.Unlock()
	f.again = nil
}

// tooLate says whether the request of f, if there is one, does not count as what the
// fetch does. Precondition: segment.mu is held.
func (f *fetch) tooLate() bool { return f.again != nil && f.asked > f.work.Standing().Rank }

// hurry has requests made anew that r waits for still and that were made for who can
// wait.
func (v *view) hurry(r *read) {
	g := v.seg
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := r.from; i < r.to; i++ {
		if c := g.claims[i]; c != nil && c.f.tooLate() {
			c.f.again(errHurry)
			c.f.again = nil
		}
	}
}
