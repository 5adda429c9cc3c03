package fleet

import (
	"math"
	"slices"
)

// Fleet is nodes on a network. Rates in bytes a second unless they say otherwise.
type Fleet struct {
	Nodes    int
	Starts   float64 // nodes that are told to start in a second
	NIC      float64 // what a node takes
	Pod      float64 // seconds until a pod is ready whose image is there
	Registry Registry
	Swarm    *Swarm // nil when every node asks the registry itself
}

// Pull is what each node does before its containers are ready.
type Pull struct {
	Bytes float64 // fetched
	// Layers of Bytes are unpacked with Unpack compressed bytes a second, one after the
	// other; nothing is when Layers is 0.
	Layers int
	Unpack float64
	// Requests one after the other, each for RTT seconds.
	Requests, RTT float64
}

// Result of a Fleet.
type Result struct {
	Ready []float64 // seconds from the beginning of the first node to each being ready, ascending
	Took  []float64 // seconds from the beginning of a node to its being ready, ascending
	Sent  float64   // bytes that the registry sent
	Busy  float64   // seconds for which the registry sent all that it could
}

// All is when the last node is ready.
func (r Result) All() float64 { return r.Ready[len(r.Ready)-1] }

// Median of what a node takes.
func (r Result) Median() float64 { return r.Took[len(r.Took)/2] }

// tick is how long nodes are told to start that count as one cohort, seconds.
const tick = 0.1

// Run has every node of f do p.
func (f Fleet) Run(p Pull) Result {
	all := f.cohorts()
	var r Result
	late := 0.0
	if f.Swarm != nil {
		fetch(all, p.Bytes, newSwarm(*f.Swarm, f.Registry, f.NIC, p.Bytes))
		r.Sent, late = p.Bytes, f.Swarm.depth(f.Nodes)
		if f.Swarm.Source >= f.Registry.Line {
			r.Busy = p.Bytes / f.Registry.Line
		}
	} else {
		d := newDirect(f.Registry, f.NIC)
		fetch(all, p.Bytes, d)
		r.Sent, r.Busy = d.sent, d.busy
	}
	for _, c := range all {
		took := p.after(c.end-c.begin+late) + f.Pod
		for range int(c.nodes) {
			r.Took = append(r.Took, took)
			r.Ready = append(r.Ready, c.begin+took)
		}
	}
	slices.Sort(r.Took)
	slices.Sort(r.Ready)
	return r
}

// cohorts groups the nodes by when they begin.
func (f Fleet) cohorts() (all []*cohort) {
	last := -1.0
	for i := range f.Nodes {
		at := math.Floor(float64(i) / f.Starts / tick)
		if at > last {
			all = append(all, &cohort{begin: at * tick})
			last = at
		}
		all[len(all)-1].nodes++
	}
	return all
}

// after is how long a node takes that fetches for d seconds.
func (p Pull) after(d float64) float64 {
	d += p.Requests * p.RTT
	if p.Layers == 0 {
		return d
	}
	unpack, layers := p.Bytes/p.Unpack, float64(p.Layers)
	return max(d+unpack/layers, d/layers+unpack)
}
