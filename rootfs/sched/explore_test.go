package sched

import (
	"testing"
	"time"
)

// TestExplore has a host of which 10 MB/s are known, when more is asked of it.
func TestExplore(t *testing.T) {
	const known = 10e6
	for name, c := range map[string]struct {
		est  estimate
		rate float64 // while it is explored
	}{
		"measured":      {estimate{capacity: known}, known * againGain},
		"fixed":         {estimate{capacity: known, fixed: true}, known * pacedGain},
		"several wants": {estimate{capacity: known, contended: true}, known * pacedGain},
		"unknown":       {estimate{}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			e := c.est
			e.explore()
			if got := e.rate(); got != c.rate {
				t.Errorf("%.3g bytes a second may come, want %.3g", got, c.rate)
			}
		})
	}
	e := estimate{capacity: known}
	e.explore()
	for i := range exploreWindows {
		e.probed(false, time.Duration(i)*minWindow)
	}
	if got := e.rate(); got != known*pacedGain {
		t.Errorf("%.3g bytes a second may come when nothing more was found", got)
	}
}
