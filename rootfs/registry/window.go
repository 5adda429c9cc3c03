package registry

import "time"

const (
	// firstRanges is with how many ranges at the same time a host is tried first.
	firstRanges = 2
	// streamsPerHost is how many streams a host may have with all ranges that
	// Config.InFlight allows to each.
	streamsPerHost = 8
	// sampleTime is for how long bytes are counted to know a rate; the first
	// sample after a change is not looked at, as connections start slowly.
	sampleTime = 200 * time.Millisecond
	// One more range has to bring this share of what it would at best.
	worthShare = 0.25
	// settleTime is for how long a size is kept that more ranges did not make
	// faster; it doubles, up to maxSettle.
	settleTime = 5 * time.Second
	maxSettle  = time.Minute
)

// window decides how many ranges streams fetch from one host at the same time:
// as many as make it faster. It starts small and grows while all of them together
// get faster for it; a range that stands still, or a refusal, halves it. Every
// stream may have one range whatever the others have. It has no clock and no lock
// of its own.
type window struct {
	max  int // 0: not known yet
	size int
	used int // ranges under way

	wanted bool      // somebody would have used one more in this sample
	start  time.Time // of the sample
	bytes  int64     // in it
	fresh  bool      // the size has changed since the last sample

	trial   bool    // the size is larger than that of base
	base    float64 // bytes a second before the trial
	before  int     // size before the trial
	from    int     // ranges under way then: each stream has one at least
	settled time.Time
	settle  time.Duration
	halved  time.Time
}

// take tells whether one more range may be fetched, by a stream that has others
// or has none.
func (w *window) take(most int, others bool) bool {
	if w.max = max(w.max, most); w.size == 0 {
		w.size = min(firstRanges, w.max)
	}
	if w.used >= w.size {
		w.wanted = true
		if others {
			return false
		}
	}
	w.used++
	return true
}

// give ends a range.
func (w *window) give() { w.used-- }

// add counts bytes that ranges got. It tells whether a trial begins.
func (w *window) add(now time.Time, n int) (trial bool) {
	gone := now.Sub(w.start)
	if gone > 4*sampleTime { // nothing was fetched in between
		w.start, w.bytes, w.wanted = now, 0, false
		return false
	}
	w.bytes += int64(n)
	if gone < sampleTime {
		return false
	}
	rate, wanted := float64(w.bytes)/gone.Seconds(), w.wanted
	w.start, w.bytes, w.wanted = now, 0, false
	switch {
	case w.fresh:
		w.fresh = false
		return false
	case w.trial:
		w.judge(now, rate)
	case wanted && max(w.size, w.used) < w.max && !now.Before(w.settled):
		w.grow(rate)
	}
	return w.trial
}

// grow begins a trial with half as many more ranges; with twice as many before
// anything has failed.
func (w *window) grow(rate float64) {
	w.trial, w.base, w.before, w.from = true, rate, w.size, max(w.size, w.used)
	if w.settled.IsZero() {
		w.resize(2 * w.from)
		return
	}
	w.resize(w.from + max(1, w.from/2))
}

// judge ends a trial, or goes on with the next one.
func (w *window) judge(now time.Time, rate float64) {
	w.trial = false
	more := float64(w.size-w.from) / float64(w.from)
	if rate < w.base*(1+worthShare*more) {
		w.resize(w.before)
		w.rest(now)
		return
	}
	w.settle = 0
	if max(w.size, w.used) < w.max {
		w.grow(rate)
	}
}

// rest keeps the size for a while.
func (w *window) rest(now time.Time) {
	w.settle = min(max(2*w.settle, settleTime), maxSettle)
	w.settled = now.Add(w.settle)
}

// halve is for what stood still or was refused. What happens together counts once.
func (w *window) halve(now time.Time) {
	if w.size == 0 || now.Sub(w.halved) < time.Second {
		return
	}
	w.trial, w.halved = false, now
	w.resize(w.size / 2)
	w.rest(now)
}

func (w *window) resize(n int) { w.size, w.fresh = min(max(n, 1), w.max), true }
