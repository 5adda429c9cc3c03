package run

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
)

// patience is how many interrupts a run passes on before it takes one for
// itself and gives the container up.
const patience = 3

// signals passes the user's signals to the container. Before there is one, or
// when the user insists, they end the run.
type signals struct {
	in     <-chan os.Signal
	target atomic.Pointer[container]
}

// watch handles signals until the returned function is called. The context
// ends when a signal is meant for the run itself.
func (s *signals) watch(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.loop(ctx, cancel)
	}()
	return ctx, func() { cancel(nil); <-done }
}

func (s *signals) loop(ctx context.Context, cancel context.CancelCauseFunc) {
	interrupts := 0
	for {
		select {
		case <-ctx.Done():
			return
		case sig := <-s.in:
			n, ok := sig.(syscall.Signal)
			if !ok {
				continue
			}
			c, ends := s.target.Load(), n == syscall.SIGINT || n == syscall.SIGTERM
			if ends {
				interrupts++
			}
			if ends && (c == nil || interrupts > patience) {
				cancel(fmt.Errorf("interrupted by %v", n))
				return
			}
			if c != nil {
				_ = c.signal(ctx, n) // it may have ended just now
			}
		}
	}
}
