package sched

import (
	"context"
	"time"
)

// Brief is Enter for what somebody else can hold up, as a client does that takes
// nothing of what it is sent: after d the turn is over, and the rest is done without.
func (s *Slots) Brief(ctx context.Context, d time.Duration) (leave func(), err error) {
	end, err := s.Enter(ctx)
	if err != nil || s == nil {
		return end, err
	}
	t := time.AfterFunc(d, end)
	return func() {
		t.Stop()
		end()
	}, nil
}
