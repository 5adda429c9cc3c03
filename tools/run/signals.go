package run

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"time"
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
			c, ends := s.target.Load(), ending(n)
			if ends {
				interrupts++
			}
			if ends && (c == nil || interrupts > patience) {
				cancel(fmt.Errorf("interrupted by %v", n))
				return
			}
			if c != nil {
				s.pass(ctx, c, n)
			}
		}
	}
}

// ending says whether a signal asks to end.
func ending(n syscall.Signal) bool {
	return n == syscall.SIGINT || n == syscall.SIGTERM || n == syscall.SIGHUP || n == syscall.SIGQUIT
}

// passTime bounds how long a guest may take to deliver a signal: one that does
// not answer must not keep the user from insisting.
const passTime = 2 * time.Second

func (s *signals) pass(ctx context.Context, c *container, n syscall.Signal) {
	ctx, cancel := context.WithTimeout(ctx, passTime)
	defer cancel()
	_ = c.signal(ctx, n) // the container may have ended just now
}
