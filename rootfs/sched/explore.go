package sched

// exploreWindows is for how long it is looked whether more comes: streams of a new
// connection, or a larger number of them, need that long to become fast.
const exploreWindows = 6

// Explore says that more answers at a time are asked of the host from now on, to see
// whether it sends more then: what is known of it must not be in the way for a while.
func (u *Upstream) Explore() {
	if u == nil {
		return
	}
	u.rate.explore()
	u.link.explore()
}

func (q *rateQueue) explore() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.est.explore()
	if !q.free {
		q.run(q.clock())
	}
}

// explore lets more than the capacity pass, unless that would be at the expense of a
// class.
func (e *estimate) explore() {
	switch {
	case e.fixed || e.contended:
	case e.capacity == 0:
		e.bound = nil // growth is not at its end
	default:
		e.probe, e.gain = exploreWindows, againGain
	}
}
