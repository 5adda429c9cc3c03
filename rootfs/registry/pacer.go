package registry

import "time"

const (
	// After a first refusal requests go out at half the rate at which they came,
	// but not below firstRate requests a second; every further one halves it, down
	// to minRate. Each answer that is none adds growRate, and from maxRate on
	// nothing is held back.
	firstRate = 8
	minRate   = 0.5
	growRate  = 4
	maxRate   = 64
	// refusalAge is after how long without a refusal all is forgotten.
	refusalAge = time.Minute
)

// pacer decides when the next request goes to one host, which may have refused
// some with 429 or 503. A refusal is a pause for all requests to the host: those
// that were on their way when it began, and are refused as well, neither make it
// longer nor count again. After it requests follow each other at a rate that
// refusals halve and answers raise. It has no clock and no lock of its own.
type pacer struct {
	until time.Time     // no request before
	asked time.Duration // what the host asked for, when that is more than maxRetryAfter
	began time.Time     // of the latest pause
	row   int           // pauses without an answer in between
	rate  float64       // requests a second; 0: as they come
	next  time.Time     // not to be reserved before, while there is a rate

	second time.Time // when counting began
	count  int       // requests since
	before float64   // requests in the second before
}

// reserve returns when one more request may go. Whoever has waited until then
// asks stale whether that is still so.
func (p *pacer) reserve(now time.Time) time.Time {
	if p.rate > 0 && now.Sub(p.began) > refusalAge {
		p.rate, p.row = 0, 0
	}
	at := later(now, p.until)
	if p.rate > 0 {
		at = later(at, p.next)
		p.next = at.Add(p.gap())
	}
	p.sent(now)
	return at
}

// giveBack is for who does not wait until at, which was reserved, when requests came
// every gap: those that come now need not wait for him.
func (p *pacer) giveBack(now, at time.Time, gap time.Duration) {
	if !p.stale(at) {
		p.next = later(now, p.next.Add(-gap))
	}
}

// gap is how long after one request the next one goes.
func (p *pacer) gap() time.Duration {
	if p.rate == 0 {
		return 0
	}
	return time.Duration(float64(time.Second) / p.rate)
}

// stale tells whether a pause has begun since at was reserved.
func (p *pacer) stale(at time.Time) bool { return at.Before(p.until) }

// sent counts a request, to know the rate when one is refused.
func (p *pacer) sent(now time.Time) {
	if gone := now.Sub(p.second); gone >= time.Second {
		p.before = float64(p.count) / gone.Seconds()
		p.second, p.count = now, 0
	}
	p.count++
}

// refuse notes that a request which was sent at some time was refused. asked is
// the pause that the host wants, negative when it did not say; wait is the one
// that it gets.
func (p *pacer) refuse(now, sent time.Time, asked, wait time.Duration) {
	if p.row > 0 && !sent.After(p.began) {
		if asked >= 0 {
			p.until = later(p.until, now.Add(wait))
		}
		return
	}
	if p.rate > 0 {
		p.rate = max(p.rate/2, minRate)
	} else {
		p.rate = max(max(float64(p.count), p.before)/2, firstRate)
	}
	p.asked = 0
	if asked > maxRetryAfter {
		p.asked = asked
	}
	p.began, p.until, p.row = now, now.Add(wait), p.row+1
	p.next = p.until
}

// answer notes that a request was not refused. One that was sent before the
// pause says nothing.
func (p *pacer) answer(sent time.Time) {
	if p.row == 0 && p.rate == 0 || !sent.After(p.began) {
		return
	}
	p.row, p.asked = 0, 0
	if p.rate += growRate; p.rate > maxRate {
		p.rate = 0
	}
}

// refusing tells whether the host has refused something lately.
func (p *pacer) refusing(now time.Time) bool { return p.row > 0 || p.rate > 0 || now.Before(p.until) }

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
