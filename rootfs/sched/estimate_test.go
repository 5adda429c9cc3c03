package sched

import (
	"testing"
	"time"
)

// TestCrowdedHost: what little comes from a host while others take the link is not what
// it can do.
func TestCrowdedHost(t *testing.T) {
	for _, c := range []struct {
		name  string
		all   int64 // bytes in a window, of which 1 MB are of the host
		known bool
	}{
		{"alone", 1e6, true},
		{"half of all", 2e6, true},
		{"a tenth of all", 10e6, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := estimate{out: 1, engaged: 1}
			var all int64
			for i := range 10 {
				now := time.Duration(i+1) * minWindow
				for range minArrivals {
					e.out++ // another read, which has ended
					e.ended(1e6/minArrivals, now)
				}
				all += c.all
				if !e.due(now) {
					t.Fatal("the window does not end")
				}
				e.close(now, wireSample{all: all})
			}
			if known := e.capacity > 0; known != c.known {
				t.Errorf("the capacity is %.0f bytes a second", e.capacity)
			}
		})
	}
}
