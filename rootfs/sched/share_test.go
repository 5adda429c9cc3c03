package sched

import (
	"testing"
	"time"
)

// measured is an estimate of 20 MB/s that several classes share, whose queues were found
// empty at its time.
func measured(seen bool) *estimate {
	e := &estimate{at: time.Minute, began: time.Minute, seen: seen}
	e.settle(20e6)
	e.contended = true
	e.lookAt = e.at + lookEvery
	return e
}

// TestLookSoon: when many readers wait for bytes that they may have, it is looked before
// the second is over whether a queue is in the way.
func TestLookSoon(t *testing.T) {
	for name, c := range map[string]struct {
		out, waiting int
		soon         bool
	}{
		"buffers are full":  {1, 19, false},
		"few readers":       {1, 1, false},
		"buffers are empty": {7, 13, true},
	} {
		t.Run(name, func(t *testing.T) {
			e := measured(false)
			wire := wireSample{known: true}
			e.wire = wire
			looked := time.Duration(0)
			for e.at < time.Minute+lookEvery/2 {
				e.out, e.waiting = c.out, c.waiting
				end := e.at + e.shortest()
				e.pass(end)
				e.win.read += 1.9e6
				wire.received += 1.9e6
				wire.all += 1.9e6
				e.close(end, wire)
				if e.look {
					looked = e.at
					break
				}
			}
			if soon := looked > 0; soon != c.soon {
				t.Errorf("looked: %v", soon)
			}
		})
	}
}

// TestProbesOfShared: a probe at the expense of a class is short, is followed by less than
// the capacity for the others, and if it finds nothing by none for long.
func TestProbesOfShared(t *testing.T) {
	for name, c := range map[string]struct {
		seen  bool
		least time.Duration // from the end of a probe to the next
	}{"host": {false, 2 * maxProbeEvery}, "link": {true, maxProbeEvery}} {
		t.Run(name, func(t *testing.T) {
			e := measured(c.seen)
			probe := func() (from, to time.Duration) {
				now := e.probeAt
				for ; e.probe == 0; now += minWindow {
					if now > e.probeAt+time.Minute {
						t.Fatal("there is no probe")
					}
					e.paced(now)
				}
				from = now - minWindow
				for ; e.probe > 0; now += minWindow {
					if e.rate() != e.capacity*probeGain {
						t.Errorf("a probe hands out %.3g bytes a second", e.rate())
					}
					e.probed(false, now)
				}
				return from, now - minWindow
			}
			from, to := probe()
			if from != e.began+minProbeEvery {
				t.Errorf("the first probe is after %v", from-e.began)
			}
			if to-from != leastProbe*minWindow {
				t.Errorf("a probe takes %v", to-from)
			}
			if e.lesser() != e.capacity*drainGain {
				t.Errorf("the other classes get %.3g bytes a second after it", e.lesser())
			}
			e.drain = 0
			if from, _ = probe(); from-to < c.least {
				t.Errorf("the next probe is %v later", from-to)
			}
		})
	}
}
