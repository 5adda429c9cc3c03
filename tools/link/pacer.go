package link

import (
	"context"
	"sync"
	"time"
)

// backlog is how much work a pacer takes ahead of the clock: the queue in
// front of the bottleneck. Short, so that a small message does not wait behind
// another connection's large one for long.
const backlog = 2 * time.Millisecond

// clock lets tests decide what time it is.
type clock interface {
	Now() time.Time
	Sleep(ctx context.Context, d time.Duration) error
}

// pacer hands out the moments at which bytes have passed a link of fixed rate.
type pacer struct {
	clock clock
	rate  int64 // bytes a second; 0 means no limit

	mu   sync.Mutex
	free time.Time // when the link has sent what it took so far
}

// take waits until the link has room and returns when n bytes will be through.
func (p *pacer) take(ctx context.Context, n int) (time.Time, error) {
	for {
		at, wait := p.reserve(n)
		if wait <= 0 {
			return at, nil
		}
		if err := p.clock.Sleep(ctx, wait); err != nil {
			return time.Time{}, err
		}
	}
}

func (p *pacer) reserve(n int) (at time.Time, wait time.Duration) {
	now := p.clock.Now()
	if p.rate == 0 {
		return now, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if ahead := p.free.Sub(now); ahead > backlog {
		return time.Time{}, ahead - backlog
	}
	if p.free.Before(now) {
		p.free = now
	}
	p.free = p.free.Add(time.Duration(int64(n) * int64(time.Second) / p.rate))
	return p.free, 0
}

type wallClock struct{}

func (wallClock) Now() time.Time { return time.Now() }

func (wallClock) Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
