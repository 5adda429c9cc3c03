package sched

import "time"

const (
	// A window of measuring. It grows to maxWindow while few reads end in it.
	minWindow   = 100 * time.Millisecond
	maxWindow   = time.Second
	minArrivals = 16

	// boundWindows are averaged for the capacity of what was the limit in all of them.
	boundWindows = 5
	// flatWindows without growth of a quarter end the start without bound.
	flatWindows = 3

	probeWindows = 3
	leastProbe   = 2 // windows, at the expense of a class
	probeGain    = 1.1
	againGain    = 2 // after a probe that found more
	// Probes that find nothing become rare.
	minProbeEvery = 2 * time.Second
	maxProbeEvery = 10 * time.Second

	// pacedGain is the part of the capacity that is handed out. What is missing keeps
	// the queues of the network empty and the buffers of the sockets full: a class that
	// gets less yields at once then. When several classes begin to want something that
	// is not so yet: until it is, all but the most important one get drainGain, so that
	// they read less than comes. The link is in use meanwhile.
	pacedGain   = 0.98
	drainGain   = 0.3
	drainWindow = 50 * time.Millisecond
	// lookGain, now and then, shows whether it still is.
	lookGain    = 0.9
	lookEvery   = time.Second
	lookSoon    = 200 * time.Millisecond // when it may not be
	fullWindows = 2
	maxDrain    = 10 // windows; then something else is the matter
	// What comes may be more than what is read, by these parts of the capacity, when
	// buffers are full.
	drainExcess = 0.2
	lookExcess  = 0.05
	lookSlack   = 64 << 10 // bytes: what is just being read

	// stalled is the part of the capacity below which a host stands still: that says
	// nothing about its rate.
	stalled = 0.01
	// crowded: a host from which less than this part of everything comes is limited by
	// what the others take.
	crowded = 4
	// lateTimer is how late a timer rings on a machine that is too busy to read.
	lateTimer = 10 * time.Millisecond
	// unreadTime is how much of what comes waits in sockets at most while the network
	// is the limit.
	unreadTime = 25 * time.Millisecond
)

// estimate learns what a host, or the node's link, can send. Without an estimate there
// is no bound. Windows of three kinds matter: network-bound ones, in which most readers
// wait for bytes that they may have, tell the capacity; paced ones, in which they wait
// for bytes that they may not have yet, tell only while it is probed for more; in the
// others nobody wants enough, or the machine is too busy.
type estimate struct {
	fixed    bool    // somebody has said what the capacity is
	seen     bool    // the capacity is what has been seen to pass: it may be more
	capacity float64 // bytes a second; 0: not known yet

	// Now: readers that wait here, that have got bytes and wait for another queue, and
	// that read; answers under way.
	waiting, held, out, engaged int
	at                          time.Duration
	win                         window
	began                       time.Duration // of win
	wire                        wireSample

	best       float64  // the most in a window of the start
	bound      []window // network-bound ones in a row
	above      float64  // rate of the latest window, if that is above the capacity
	contended  bool     // several classes want something
	drain      int      // windows until queues are empty, as far as is known
	look       bool     // whether they are
	lookAt     time.Duration
	drained    int     // windows of draining in a row
	probe      int     // windows that are left of a probe
	gain       float64 // of the probe
	probeAt    time.Duration
	probeEvery time.Duration
}

// window sums up what happened in some time. The sums of readers are in
// reader-nanoseconds.
type window struct {
	len                         time.Duration
	all                         int64 // bytes that were read from all hosts
	arrived, read               int64 // bytes
	arrivals                    int
	waiting, held, out, engaged float64
	wanted                      time.Duration // in which somebody waited or read
	late                        bool
	unread                      int64 // bytes in sockets at the end; -1: not known
}

// wireSample is what the kernel received.
type wireSample struct {
	known    bool  // for all that is read
	received int64 // bytes since something
	unread   int64 // bytes that wait in sockets
	all      int64 // bytes that were read from all hosts since something
}

func (w *window) rate() float64 { return float64(w.arrived) / w.len.Seconds() }

// pass lets time pass until now.
func (e *estimate) pass(now time.Duration) {
	d := now - e.at
	if d <= 0 {
		return
	}
	e.at = now
	w := &e.win
	w.waiting += float64(d) * float64(e.waiting)
	w.held += float64(d) * float64(e.held)
	w.out += float64(d) * float64(e.out)
	w.engaged += float64(d) * float64(e.engaged)
	if e.waiting+e.out > 0 {
		w.wanted += d
	}
}

// ended counts a read of which n bytes came.
func (e *estimate) ended(n int64, now time.Duration) {
	e.pass(now)
	e.out--
	e.win.read += n
	e.win.arrivals++
}

// due says whether the window is to be closed.
func (e *estimate) due(now time.Duration) bool {
	d := now - e.began
	return d >= e.shortest() && (e.win.arrivals >= minArrivals || d >= maxWindow || e.out+e.waiting == 0)
}

func (e *estimate) shortest() time.Duration {
	if e.draining() {
		return drainWindow
	}
	return minWindow
}

// readers are those who wait or read, here or in another queue.
func (e *estimate) readers() int { return e.waiting + e.held + e.out }

// next is when the window may be closed; 0 when nobody wants anything.
func (e *estimate) next(now time.Duration) time.Duration {
	if e.out+e.waiting == 0 {
		return 0
	}
	if at := e.began + e.shortest(); at > now {
		return at
	}
	return e.began + maxWindow
}

// close ends a window and learns from it.
func (e *estimate) close(now time.Duration, wire wireSample) {
	e.pass(now)
	w := e.win
	w.len, w.arrived, w.unread = now-e.began, w.read, -1
	if wire.known && e.wire.known && wire.received >= e.wire.received {
		w.arrived, w.unread = wire.received-e.wire.received, wire.unread
	}
	w.all = wire.all - e.wire.all
	e.win, e.began, e.wire = window{}, now, wire
	kind := e.kind(w)
	if kind == idle {
		return
	}
	if e.capacity == 0 {
		e.start(w, kind)
		return
	}
	e.full(w, kind, now)
	if e.fixed {
		return
	}
	more := e.raise(w)
	switch {
	case e.probe > 0:
		e.probed(more, now)
	case kind == networkBound:
		e.limited(w)
	default:
		e.paced(now)
	}
}

// contend is told whether several classes want something.
func (e *estimate) contend(yes bool) {
	if yes && !e.contended {
		e.drain = fullWindows
	}
	e.contended = yes
}

// full looks whether the buffers of sockets are full: whether what comes is what is read
// while readers wait for their turn.
func (e *estimate) full(w window, kind windowKind, now time.Duration) {
	most := lookExcess
	if e.drain > 0 {
		most = drainExcess
	}
	excess := kind == networkBound || float64(w.arrived-w.read-lookSlack) > most*e.capacity*w.len.Seconds()
	switch {
	case w.unread < 0: // nobody knows
		e.drain, e.look = 0, false
	case e.drained == maxDrain: // something else is the matter
		e.drain, e.drained, e.look = 0, 0, false
		e.lookAt = now + maxDrain*lookEvery
	case excess && (e.drain > 0 || e.look):
		e.drain, e.look = fullWindows, false
		e.drained++
	case e.drain > 0:
		e.drain--
		e.drained = 0
		e.lookAt = now + lookEvery
	case e.look:
		e.look, e.lookAt = false, now+lookEvery
	default:
		e.look = e.contended && (now >= e.lookAt || w.starved() && now >= e.lookAt-lookEvery+lookSoon)
	}
}

// starved says that many readers have waited for what they might have: it is not in
// buffers, so there may be a queue in the network.
func (w window) starved() bool {
	return w.out > 2*float64(w.len) && w.out > (w.waiting+w.held+w.out)/8
}

// raise takes over what came in two windows in a row, if that is more than was known.
func (e *estimate) raise(w window) bool {
	before := e.above
	e.above = 0
	if w.rate() <= e.capacity*1.01 {
		return false
	}
	e.above = w.rate()
	if before == 0 {
		return false
	}
	e.capacity = min(before, e.above)
	return true
}

type windowKind int

const (
	idle windowKind = iota // says nothing
	networkBound
	pacedByUs
)

func (e *estimate) kind(w window) windowKind {
	readers := max(w.engaged, w.out+w.waiting+w.held)
	switch {
	case w.wanted < w.len*9/10, w.rate() < stalled*e.capacity, w.late && w.unread < 0:
		return idle
	case w.waiting > w.out:
		return pacedByUs
	case e.seen:
		return networkBound
	case w.out < 0.6*readers, w.read < w.all/crowded:
		return idle
	case w.unread >= 0 && float64(w.unread) > max(w.rate()*unreadTime.Seconds(), 256<<10):
		return idle
	}
	return networkBound
}

// start looks for the rate at which growth ends.
func (e *estimate) start(w window, kind windowKind) {
	if kind != networkBound {
		return
	}
	if w.rate() > e.best*1.25 {
		e.best, e.bound = w.rate(), nil
		return
	}
	e.bound = append(e.bound, w)
	if len(e.bound) == flatWindows {
		e.settle(mean(e.bound))
	}
}

func (e *estimate) settle(capacity float64) {
	e.capacity, e.bound, e.above = max(capacity, minQuantum), nil, 0
	e.probeAt, e.probeEvery = e.began+minProbeEvery, minProbeEvery
}

// limited lowers the capacity to what came while the network was the limit for some
// windows in a row.
func (e *estimate) limited(w window) {
	e.bound = append(e.bound, w)
	if len(e.bound) == boundWindows {
		if got := mean(e.bound); got < e.capacity {
			e.settle(got)
		}
		e.bound = nil
	}
}

func mean(ws []window) float64 {
	var sum window
	for _, w := range ws {
		sum.arrived += w.arrived
		sum.len += w.len
	}
	return sum.rate()
}

// paced begins a probe now and then.
func (e *estimate) paced(now time.Duration) {
	e.bound = nil
	at, windows := e.probeAt, probeWindows
	if e.contended {
		windows = leastProbe
		if !e.seen && e.probeEvery > minProbeEvery { // the latest probe found nothing
			at += maxProbeEvery
		}
	}
	if now >= at {
		e.probe, e.gain = windows, probeGain
	}
}

// probed counts a window of a probe. more says that it found more.
func (e *estimate) probed(more bool, now time.Duration) {
	e.probe--
	if more {
		e.probe, e.gain, e.probeEvery = probeWindows, againGain, minProbeEvery
	}
	if e.probe == 0 {
		if e.contended {
			e.drain = fullWindows // of what has been too much
			e.probeEvery = maxProbeEvery
		}
		e.probeAt = now + e.probeEvery
		e.probeEvery = min(2*e.probeEvery, maxProbeEvery)
	}
}

// rate is how many bytes a second may be handed out; 0: no bound.
func (e *estimate) rate() float64 {
	switch {
	case e.draining():
		return e.capacity * pacedGain
	case e.probe > 0:
		return e.capacity * e.gain
	case e.contended && e.look:
		return e.capacity * lookGain
	case e.seen:
		return e.capacity // hosts are paced, and are to be what readers wait for
	}
	return e.capacity * pacedGain
}

func (e *estimate) draining() bool { return e.contended && e.drain > 0 }

// lesser is how many bytes a second all classes but the most important one may get
// together; 0: no such bound.
func (e *estimate) lesser() float64 {
	if !e.draining() {
		return 0
	}
	return e.capacity * drainGain
}
