package sched

import (
	"testing"
	"time"
)

// TestWindowOfLongPath has a fast link and a host that is far away, or says so late.
func TestWindowOfLongPath(t *testing.T) {
	for _, capacity := range []float64{100e9 / 8, 1e18} {
		for _, n := range []int{1, 32} {
			w := wire{state: state{rtt: 2 * time.Second, segment: 1448}}
			if got := w.best(capacity, n, n); got != mostWindow {
				t.Errorf("%g bytes a second, %d connections: window %d", capacity, n, got)
			}
		}
	}
}
