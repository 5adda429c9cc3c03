package sched

import (
	"math"
	"time"
)

const (
	minQuantum = 16 << 10
	maxQuantum = 1 << 20
	// quantumTime is how long a grant keeps a link busy: what is important waits at
	// most so long for what is not.
	quantumTime = time.Millisecond
	// freeQuantum is a grant while no rate is known.
	freeQuantum = 256 << 10

	// Bytes are handed out late when timers are, or when who reads is late. While
	// somebody waits what is late is made up for, unless a burst would hurt another
	// class; else a little, so that a single connection, which does not wait while it
	// reads, gets everything.
	busyBurst = 50 * time.Millisecond
	idleBurst = 8 * time.Millisecond
)

// pace hands out bytes at a rate.
type pace struct {
	core
	rate   float64 // bytes a second; 0: no bound
	tokens float64 // bytes that may be granted; negative after a grant that was larger
	at     time.Duration
	// open lets the most important class that wants something pass whatever the rate
	// is, which only others keep to: what it takes shows whether it can be more.
	open     bool
	leastTop peak // for which least was set
}

// setRate changes the rate.
func (p *pace) setRate(rate float64, now time.Duration) {
	if rate == p.rate {
		return
	}
	p.refill(now)
	if p.rate == 0 {
		p.tokens = 1 // one grant may go at once
	}
	p.rate = rate
	p.tokens = min(max(p.tokens, -float64(p.quantum())), p.burst(idleBurst))
	p.bounds(rate)
	p.least.rate = 0 // to be set again
}

// guarantee sets what is got below the most important of what is wanted, where that
// passes freely: shares, or floors.
func (p *pace) guarantee(now time.Duration) {
	if !p.open || p.least.rate > 0 && p.leastTop == p.top {
		return
	}
	sum, least := 0, 0.0
	for _, s := range p.shares[p.top.class:] {
		sum += s.class.Share
	}
	for _, s := range p.shares[p.top.class+1:] {
		least += max(p.rate*float64(s.class.Share)/float64(sum), s.floor.rate)
	}
	if p.top.urgent {
		back := p.tiers[Background.tier()].weight
		least = max(least, p.rate*back/(back+p.tiers[Demand.tier()].weight))
	}
	p.least, p.leastTop = meter{rate: least, at: now}, p.top
}

// passes says whether work may be granted something although the rate is used up.
func (p *pace) passes(class int, r Rank, now time.Duration) bool {
	return !p.top.over(class, r) || p.least.rate > 0 && p.least.blocked(now) == 0
}

func (p *pace) refill(now time.Duration) {
	most := idleBurst
	if p.waiting > 0 && !p.contended {
		most = busyBurst
	}
	p.tokens = min(p.tokens+p.rate*(now-p.at).Seconds(), p.burst(most))
	p.at = now
}

func (p *pace) burst(d time.Duration) float64 {
	return max(p.rate*d.Seconds(), float64(p.quantum()))
}

// quantum is the most that is granted at once, in bytes.
func (p *pace) quantum() int64 {
	if p.rate == 0 {
		return freeQuantum
	}
	return min(max(int64(p.rate*quantumTime.Seconds()), minQuantum), maxQuantum)
}

// ask lets t wait.
func (p *pace) ask(t *ticket, s Standing, now time.Duration) {
	p.refill(now)
	p.put(t, s, now)
}

// run grants what may go now. It returns when it has to run again; 0 when nothing waits
// for time to pass.
func (p *pace) run(now time.Duration) (wake time.Duration) {
	p.refill(now)
	p.guarantee(now)
	for p.waiting > 0 {
		var may func(class int, r Rank) bool
		if p.rate > 0 && p.tokens <= 0 {
			wake = now + time.Duration(math.Ceil((1-p.tokens)/p.rate*1e9))
			if !p.open {
				return wake
			}
			may = func(class int, r Rank) bool { return p.passes(class, r, now) }
		}
		t, floor, ceiling := p.first(now, may)
		if t == nil {
			return p.blocked(wake, ceiling, now)
		}
		n := min(t.want, max(p.quantum(), int64(p.tokens)))
		if p.rate > 0 {
			p.tokens -= float64(n)
		}
		if p.open {
			p.tokens = max(p.tokens, -p.burst(idleBurst))
		}
		p.grant(t, n, floor, now)
	}
	return 0
}

// blocked is when to run again: at wake, when the rate lets everybody pass, if that is
// not 0; when a ceiling does; or when what others get in any case does.
func (p *pace) blocked(wake, ceiling, now time.Duration) time.Duration {
	if wake == 0 { // nothing is late
		p.tokens = min(p.tokens, float64(p.quantum()))
		return ceiling
	}
	if ceiling > 0 {
		wake = min(wake, ceiling)
	}
	if at := p.least.blocked(now); at > 0 {
		wake = min(wake, at)
	}
	return wake
}

// unused gives back n granted bytes.
func (p *pace) unused(ch charge, n int64, now time.Duration) {
	if p.rate > 0 {
		p.refill(now)
		p.tokens += float64(n)
	}
	p.correct(ch, -n, now)
}
