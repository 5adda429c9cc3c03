package sched

import (
	"context"
	"slices"
	"sync"
)

// Rank says how urgent work is inside its class.
type Rank uint8

// Ranks, the most urgent first.
const (
	Demand     Rank = iota // somebody waits for it
	Prefetch               // somebody will probably ask for it soon
	Background             // nobody has asked for it
)

func (r Rank) String() string {
	return [...]string{"demand", "prefetch", "background"}[min(r, Background)]
}

// Flow is whom work is for: one sandbox, or one job of the node itself. Flows of a
// class share evenly what the class has. It is immutable; work of the same flow has
// the same pointer.
type Flow struct {
	class *Class // nil: of no scheduler
	order int    // of the class, by importance
	id    string
}

// Class is the class of the flow; one without a name for a nil Flow and for flows of a
// nil Scheduler.
func (f *Flow) Class() *Class {
	if f == nil || f.class == nil {
		return &Class{}
	}
	return f.class
}

// ID names the flow in its class: a sandbox.
func (f *Flow) ID() string {
	if f == nil {
		return ""
	}
	return f.id
}

// Standing is what the turn of a piece of work depends on.
type Standing struct {
	Flow *Flow // nil: of the default class, in one flow with everything that has none
	Rank Rank
}

// Before says whether a goes before b: background work last, whatever its class, a more
// important class first, then a more urgent rank. Where a flow is missing only the
// ranks count.
func (a Standing) Before(b Standing) bool {
	if i, k := a.Rank.tier(), b.Rank.tier(); i != k {
		return i < k
	}
	if a.Flow != nil && b.Flow != nil && a.Flow.order != b.Flow.order {
		return a.Flow.order < b.Flow.order
	}
	return a.Rank < b.Rank
}

// Work is something that goes through one queue after another, as the fetch of some
// chunks does: registry, link, CPU, disk. Its standing may rise while it waits, when
// somebody more important needs what it brings. Several goroutines may wait with the
// same work. A nil Work is of the default class, of rank Demand, and stays so.
type Work struct {
	mu    sync.Mutex
	base  Standing
	now   Standing
	waits []*ticket // in queues; protected by mu

	shared             bool    // it has no standing of its own; immutable
	leaders, followers []*Work // see Follow; protected by mu
}

// waiting is a queue that has to look again when the standing of a ticket changes.
type waiting interface{ moved(t *ticket) }

// NewWork returns work of this standing.
func NewWork(s Standing) *Work { return &Work{base: s, now: s} }

// Standing is what counts now.
func (w *Work) Standing() Standing {
	if w == nil {
		return Standing{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// Promote lets the work count as that of s, if that comes first. It tells whether it
// did. What it takes from then on is charged to the flow of s.
func (w *Work) Promote(s Standing) bool {
	return w.change(func(now Standing) (Standing, bool) { return s, s.Before(now) })
}

// Set lets the work count as that of s from now on, whether that comes first or not.
func (w *Work) Set(s Standing) {
	w.change(func(now Standing) (Standing, bool) { return s, now != s })
}

func (w *Work) change(f func(Standing) (Standing, bool)) bool {
	if w == nil {
		return false
	}
	w.mu.Lock()
	next, ok := f(w.now)
	var waits []*ticket
	if ok {
		w.now = next
		waits = slices.Clone(w.waits)
	}
	followers := w.followers
	w.mu.Unlock()
	if !ok {
		return false
	}
	for _, t := range waits {
		t.queue.moved(t)
	}
	for _, f := range followers {
		f.recount()
	}
	return true
}

// join says where t, which is about to wait, belongs, and has it moved when that
// changes. Precondition: the lock of its queue, until it waits.
func (w *Work) join(t *ticket) Standing {
	if w == nil {
		return Standing{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waits = append(w.waits, t)
	return w.now
}

// part ends join.
func (w *Work) part(t *ticket) {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if i := slices.Index(w.waits, t); i >= 0 {
		w.waits = slices.Delete(w.waits, i, i+1)
	}
}

type workKey struct{}

// With returns a context of work: the registry's client, the readers of layers and
// the store take from it whose turn it is.
func With(ctx context.Context, w *Work) context.Context { return context.WithValue(ctx, workKey{}, w) }

// From is the work of a context; nil when it has none, which counts as work of the
// default class, of rank Demand.
func From(ctx context.Context) *Work {
	w, _ := ctx.Value(workKey{}).(*Work)
	return w
}

type rankKey struct{}

// WithRank returns a context in which reads of the store have at most the rank r: a
// caller who knows that nobody waits says so.
func WithRank(ctx context.Context, r Rank) context.Context {
	return context.WithValue(ctx, rankKey{}, max(r, RankOf(ctx)))
}

// RankOf is the rank of WithRank; Demand when there is none.
func RankOf(ctx context.Context) Rank {
	r, _ := ctx.Value(rankKey{}).(Rank)
	return r
}
