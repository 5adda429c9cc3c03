package store

import (
	"context"
	"sync/atomic"
	"time"
)

// gate lets background fetches see whether demand reads wait.
type gate struct {
	waiting atomic.Int64 // demand reads that wait for chunks
	left    atomic.Int64 // when the last one ended, Unix nanoseconds
}

func (g *gate) enter() { g.waiting.Add(1) }

func (g *gate) leave() {
	g.left.Store(time.Now().UnixNano())
	g.waiting.Add(-1)
}

// open says whether no demand read has waited for the last quiet.
func (g *gate) open(quiet time.Duration) bool {
	return g.waiting.Load() == 0 && time.Now().UnixNano()-g.left.Load() >= int64(quiet)
}

// pass waits until the gate is open, but not longer than patience, so that
// background work is slowed by steady demand and never stopped.
func (g *gate) pass(ctx context.Context, quiet, patience time.Duration) error {
	until := time.Now().Add(patience)
	for !g.open(quiet) && time.Now().Before(until) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(quiet):
		}
	}
	return ctx.Err()
}
