package sched

import (
	"math"
	"time"
)

// A floor or a ceiling allows this much at once.
const meterBurst = 20 * time.Millisecond

// meter counts against a steady rate: below it while there are tokens.
type meter struct {
	rate   float64 // units a second; 0: there is no such bound
	tokens float64
	at     time.Duration // when tokens was right
}

func (m *meter) burst() float64 { return m.rate * meterBurst.Seconds() }

func (m *meter) refill(now time.Duration) {
	m.tokens = min(m.tokens+m.rate*(now-m.at).Seconds(), m.burst())
	m.at = now
}

// blocked is until when nothing may pass; 0: it may.
func (m *meter) blocked(now time.Duration) time.Duration {
	if m.rate == 0 {
		return 0
	}
	m.refill(now)
	if m.tokens > 0 {
		return 0
	}
	return m.at + time.Duration(math.Ceil((1-m.tokens)/m.rate*1e9))
}

// owe takes n tokens, of which so many may be missing that a burst makes up for them:
// who got more for a long time is not below the rate for as long after that.
func (m *meter) owe(n int64) {
	m.tokens = max(m.tokens-float64(n), -m.burst()-float64(max(n, 0)))
}

// lately is a rate over the last seconds, older ones weighing less.
type lately struct {
	sum float64
	at  time.Duration
}

const latelyTime = 2 * time.Second

func (l *lately) add(now time.Duration, n float64) {
	l.sum = l.decayed(now) + n
	l.at = now
}

func (l *lately) decayed(now time.Duration) float64 {
	return l.sum * math.Exp(-float64(now-l.at)/float64(latelyTime))
}

// rate is units a second.
func (l *lately) rate(now time.Duration) float64 { return l.decayed(now) / latelyTime.Seconds() }
