package registry

import (
	"testing"
	"time"
)

func TestPatience(t *testing.T) {
	const least, stall = time.Second, 30 * time.Second
	start := time.Unix(1, 0)
	var p patience
	for _, tc := range []struct {
		name string
		at   time.Duration
		wait time.Duration // that ended then; 0: none
		want time.Duration
	}{
		{"a host of which nothing is known", 0, 0, 10 * time.Second},
		{"a fast one", 0, 10 * time.Millisecond, least},
		{"a slow one", time.Second, 2 * time.Second, 8 * time.Second},
		{"the longest wait counts", 2 * time.Second, time.Millisecond, 8 * time.Second},
		{"in the next minute, too", 70 * time.Second, time.Millisecond, 8 * time.Second},
		{"not in the one after that", 140 * time.Second, time.Millisecond, least},
		{"much shorter than the stall time", 141 * time.Second, 20 * time.Second, 10 * time.Second},
		{"long ago", time.Hour, time.Millisecond, least},
	} {
		if tc.wait > 0 {
			p.waited(start.Add(tc.at), tc.wait)
		}
		if got := p.after(least, stall); got != tc.want {
			t.Errorf("%s: a second request after %v, want %v", tc.name, got, tc.want)
		}
	}
	now := start.Add(2 * time.Hour)
	for i, want := range []bool{false, false, true} {
		if got := p.lost(now, 3*time.Second); got != want {
			t.Errorf("race %d lost: too often %v", i, got)
		}
	}
	if got := p.after(least, stall); got != stall/3 {
		t.Errorf("after lost races: a second request after %v", got)
	}
	if p.finished(); p.lost(now, 0) {
		t.Error("races are lost too often although a range was finished")
	}
	spend := func() (n int) {
		for p.spend() {
			n++
		}
		return n
	}
	if n := spend(); n != hedgeBurst {
		t.Errorf("%d second requests at once", n)
	}
	for range 70 {
		p.request()
	}
	if n := spend(); n != 3 {
		t.Errorf("%d second requests for 70 more", n)
	}
	for range 10_000 {
		p.request()
	}
	if n := spend(); n != hedgeBurst {
		t.Errorf("%d second requests after a good time", n)
	}
}
