package fleet

import "math"

// Swarm is a peer-to-peer network: Dragonfly with a seed peer.
type Swarm struct {
	Source     float64 // what the seed gets from the registry, bytes a second
	Seeds      float64 // nodes that upload like a peer from the beginning
	Upload     float64 // of a peer, bytes a second
	Efficiency float64 // share of the peers' upload that others can use (η)
	Piece      float64 // bytes
	Peers      float64 // whom one serves at a time (k)
	RTT        float64 // of a request to a peer, seconds
}

// depth is how long the first piece takes to the last of the nodes, seconds.
func (s Swarm) depth(nodes int) float64 {
	hops := math.Ceil(math.Log(float64(nodes)) / math.Log(s.Peers))
	return hops * (s.Piece/s.Upload + s.RTT)
}

// swarm is one image in a Swarm.
type swarm struct {
	Swarm
	nic   float64
	need  float64
	front float64 // what the seed has
	peers float64 // nodes that upload: all that have begun

	source float64 // at which front grows, until the next event
}

func newSwarm(s Swarm, r Registry, nic, need float64) *swarm {
	s.Source = min(s.Source, r.Line)
	return &swarm{Swarm: s, nic: nic, need: need}
}

func (s *swarm) join(nodes float64) { s.peers += nodes }

// share lets those at the front go on with it, and the others catch up, all of them
// within what is uploaded.
func (s *swarm) share(active []*cohort) float64 {
	s.source = 0
	horizon := math.Inf(1)
	if s.need-s.front > epsilon {
		s.source = s.Source
		horizon = (s.need - s.front) / s.source
	}
	if len(active) == 0 {
		return horizon
	}
	upload := s.Upload * (s.Seeds + s.Efficiency*s.peers)
	all := count(active)
	ahead := s.atFront(active)
	behind := all - ahead
	follow := min(s.source, s.nic, upload/all)
	catch := 0.0
	if behind > 0 {
		catch = min(s.nic, (upload-ahead*follow)/behind)
	}
	for _, c := range active {
		c.rate = catch
		if s.front-c.got < epsilon {
			c.rate = follow
		} else if catch > s.source {
			horizon = min(horizon, (s.front-c.got)/(catch-s.source))
		}
	}
	return horizon
}

func (s *swarm) atFront(active []*cohort) (nodes float64) {
	for _, c := range active {
		if s.front-c.got < epsilon {
			nodes += c.nodes
		}
	}
	return nodes
}

func (s *swarm) advance(dt float64) {
	s.front = min(s.need, s.front+s.source*dt)
}
