package registry

import (
	"testing"
	"time"
)

// road is what a window fetches over: bytes a second of each range, of all
// together, and of who reads them.
type road struct{ one, all, reader float64 }

// drive has streams with 4 ranges each use the window for a while: every 10 ms
// each takes the ranges that it may.
func drive(w *window, r road, now time.Time, streams int, length time.Duration) time.Time {
	const step = 10 * time.Millisecond
	parts := make([]int, streams)
	for end := now.Add(length); now.Before(end); now = now.Add(step) {
		for i := range parts {
			// A reader that does not keep up has all its parts full.
			for parts[i] < 4 && (r.reader > r.one*float64(w.used) || parts[i] == 0) && w.take(4*streamsPerHost, parts[i] > 0) {
				parts[i]++
			}
		}
		rate := min(r.one*float64(w.used), r.all, r.reader)
		w.add(now, int(rate*step.Seconds()))
		for i := range parts { // ranges end now and then
			if now.UnixMilli()%70 < 10 && parts[i] > 0 {
				parts[i]--
				w.give()
			}
		}
	}
	for i := range parts {
		for ; parts[i] > 0; parts[i]-- {
			w.give()
		}
	}
	return now
}

func TestWindow(t *testing.T) {
	const mb = 1e6
	fast := 1e12
	for _, tc := range []struct {
		name        string
		road        road
		streams     int
		least, most int
	}{
		{"one range fills the link", road{125 * mb, 125 * mb, fast}, 3, 1, 2},
		{"slow ranges", road{12 * mb, 125 * mb, fast}, 4, 9, 15},
		{"very slow ranges", road{5 * mb, 1250 * mb, fast}, 8, 32, 32},
		{"a slow reader", road{30 * mb, 1250 * mb, 50 * mb}, 2, 1, 2},
		{"one stream", road{30 * mb, 1250 * mb, fast}, 1, 4, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var w window
			now := drive(&w, tc.road, time.Unix(1, 0), tc.streams, 10*time.Second)
			if w.size < tc.least || w.size > tc.most || w.used != 0 {
				t.Errorf("%d ranges seem worth it, want %d to %d; %d are left", w.size, tc.least, tc.most, w.used)
			}
			// A stall halves it, once for all that stand still; then it comes back.
			was := w.size
			w.halve(now)
			w.halve(now.Add(time.Millisecond))
			if w.size != max(was/2, 1) {
				t.Errorf("halved from %d to %d", was, w.size)
			}
			drive(&w, tc.road, now, tc.streams, 2*time.Minute)
			if w.size < tc.least || w.size > tc.most {
				t.Errorf("%d ranges two minutes later", w.size)
			}
		})
	}
}

// TestWindowShares has streams of which each goes on whatever the others do.
func TestWindowShares(t *testing.T) {
	var w window
	for i, want := range []bool{true, true, false} {
		if got := w.take(4, i > 0); got != want {
			t.Errorf("range %d of the first stream: %v", i, got)
		}
	}
	if !w.take(4, false) || w.take(4, true) {
		t.Error("another stream has none, or more than one")
	}
}
