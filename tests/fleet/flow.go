package fleet

import "math"

// cohort are nodes that begin at the same time, and so have the same in all that
// follows. Times in seconds, sizes in bytes.
type cohort struct {
	nodes float64
	begin float64
	got   float64
	rate  float64 // of each node, set by network.share
	end   float64 // when got is all; 0 before that
}

// network says how fast nodes get bytes.
type network interface {
	// join tells of nodes that begin.
	join(nodes float64)
	// share sets the rate of each cohort, of all that fetch at this time, and
	// returns for how long these are right if no cohort comes or goes.
	share(active []*cohort) float64
	// advance lets that much time pass.
	advance(dt float64)
}

// epsilon is how many bytes are as good as none, against rounding.
const epsilon = 1e-3

// fetch runs all cohorts, which are in order of their beginning, until each has need
// bytes.
func fetch(all []*cohort, need float64, net network) {
	var active []*cohort
	now := 0.0
	for next := 0; next < len(all) || len(active) > 0; {
		dt := math.Inf(1)
		if next < len(all) {
			dt = all[next].begin - now
		}
		dt = min(dt, net.share(active))
		for _, c := range active {
			if c.rate > 0 {
				dt = min(dt, (need-c.got)/c.rate)
			}
		}
		if math.IsInf(dt, 1) {
			panic("fleet: nobody gets anything any more") // no network here does that
		}
		now += dt
		net.advance(dt)
		active = advance(active, dt, now, need)
		for next < len(all) && all[next].begin <= now {
			active = append(active, all[next])
			net.join(all[next].nodes)
			next++
		}
	}
}

// advance gives each cohort what it gets in dt and drops those that have all.
func advance(active []*cohort, dt, now, need float64) []*cohort {
	left := active[:0]
	for _, c := range active {
		c.got += c.rate * dt
		if need-c.got < epsilon {
			c.end = now
			continue
		}
		left = append(left, c)
	}
	return left
}

func count(active []*cohort) (nodes float64) {
	for _, c := range active {
		nodes += c.nodes
	}
	return nodes
}
