package fleet

import "math"

// Registry is what sends images. Rates in bytes a second.
type Registry struct {
	Line float64
	// Burst is how many bytes it sends at the rate of the line before it sends at
	// Sustained; it does not throttle when this is 0.
	Burst, Sustained float64
}

// direct is a registry that every node asks.
type direct struct {
	Registry
	nic    float64 // of a node
	tokens float64 // left of Burst
	busy   float64 // seconds for which the registry was what nodes waited for
	sent   float64 // bytes

	rate, limit float64 // of all, and the most, until the next event
}

func newDirect(r Registry, nic float64) *direct {
	return &direct{Registry: r, nic: nic, tokens: r.Burst}
}

func (d *direct) join(float64) {}

func (d *direct) share(active []*cohort) float64 {
	n := count(active)
	d.rate = 0
	if n == 0 {
		return math.Inf(1)
	}
	d.limit = d.Line
	throttled := d.Burst > 0 && d.tokens <= epsilon
	if throttled {
		d.limit = min(d.Line, d.Sustained)
	}
	each := min(d.nic, d.limit/n)
	for _, c := range active {
		c.rate = each
	}
	d.rate = each * n
	if d.Burst > 0 && !throttled && d.rate > d.Sustained {
		return d.tokens / (d.rate - d.Sustained)
	}
	return math.Inf(1)
}

func (d *direct) advance(dt float64) {
	d.sent += d.rate * dt
	if d.rate > 0 && d.rate >= d.limit*(1-1e-9) {
		d.busy += dt
	}
	if d.Burst > 0 {
		d.tokens = min(d.Burst, max(0, d.tokens+(d.Sustained-d.rate)*dt))
	}
}
