package fleet

import (
	"math"
	"math/bits"
	"math/rand/v2"
	"testing"
)

// By hand: what fluids do in simple cases.
func TestByHand(t *testing.T) {
	at := func(f Fleet, p Pull) float64 { return f.Run(p).All() }
	line := Registry{Line: 100}
	once := Pull{Bytes: 1000}
	all := func(n int) float64 { return float64(n) / tick } // of starts a second: all at once
	for _, c := range []struct {
		name      string
		got, want float64
	}{
		{"one node, its card is the bound", at(Fleet{Nodes: 1, Starts: all(1), NIC: 50, Registry: line}, once), 20},
		{"four nodes, the line is the bound", at(Fleet{Nodes: 4, Starts: all(4), NIC: 50, Registry: line}, once), 40},
		{"a pod takes its time", at(Fleet{Nodes: 4, Starts: all(4), NIC: 50, Pod: 3, Registry: line}, once), 43},
		// 10 s of allowance at 100 less the 20 that come in: 800 / 80; then 3000 at 20.
		{"throttled", at(Fleet{Nodes: 4, Starts: all(4), NIC: 50, Registry: Registry{Line: 100, Burst: 800, Sustained: 20}}, once), 10 + 3000.0/20},
		// The second begins when the first has 500: both at 50, then the second alone at 100.
		{"one after the other", at(Fleet{Nodes: 2, Starts: 0.2, NIC: 100, Registry: line}, once), 20},
		{"unpacked slower than fetched", at(Fleet{Nodes: 1, Starts: all(1), NIC: 100, Registry: line}, Pull{Bytes: 1000, Layers: 10, Unpack: 50}), 1 + 20},
		{"unpacked faster than fetched", at(Fleet{Nodes: 1, Starts: all(1), NIC: 100, Registry: line}, Pull{Bytes: 1000, Layers: 10, Unpack: 200}), 10 + 0.5},
		{"requests one after the other", at(Fleet{Nodes: 1, Starts: all(1), NIC: 100, Registry: line}, Pull{Bytes: 1000, Requests: 20, RTT: 0.1}), 12},
		{"the seed is the bound", at(Fleet{Nodes: 16, Starts: all(16), NIC: 100, Registry: line,
			Swarm: &Swarm{Source: 10, Seeds: 1, Upload: 50, Efficiency: 1, Piece: 10, Peers: 2}}, once), 100 + 4*10.0/50},
		{"uploads are the bound", at(Fleet{Nodes: 10, Starts: all(10), NIC: 100, Registry: line,
			Swarm: &Swarm{Source: 100, Seeds: 2, Upload: 10, Efficiency: 0.5, Piece: 0, Peers: 2}}, once), 10 * 1000 / (10 * (2 + 0.5*10))},
	} {
		if math.Abs(c.got-c.want) > 1e-6*c.want {
			t.Errorf("%s: %.4f s, want %.4f", c.name, c.got, c.want)
		}
	}
}

// Every byte that the nodes get is sent, and more nodes are never faster.
func TestMonotone(t *testing.T) {
	for _, w := range Ways() {
		before := 0.0
		for _, n := range Sizes {
			r := w.Run(n)
			if len(r.Ready) != n || len(r.Took) != n {
				t.Fatalf("%s: %d of %d nodes are ready", w.Name, len(r.Ready), n)
			}
			want := w.pull.Bytes
			if !w.peers {
				want *= float64(n)
			}
			if math.Abs(r.Sent-want) > 1e-6*want {
				t.Errorf("%s, %d nodes: %.0f bytes sent, want %.0f", w.Name, n, r.Sent, want)
			}
			if r.All() < before-1e-6 {
				t.Errorf("%s: %d nodes take %.2f s, fewer took %.2f", w.Name, n, r.All(), before)
			}
			before = r.All()
		}
	}
}

// Which way is faster than which does not hang on constants that were fitted or assumed:
// the order is the same when each of them is half or twice as large.
func TestOrder(t *testing.T) {
	change := map[string]func(f *Fleet, p *Pull, by float64){
		"pod":         func(f *Fleet, _ *Pull, by float64) { f.Pod *= by },
		"starts":      func(f *Fleet, _ *Pull, by float64) { f.Starts *= by },
		"line":        func(f *Fleet, _ *Pull, by float64) { f.Registry.Line *= by },
		"unpacking":   func(_ *Fleet, p *Pull, by float64) { p.Unpack *= by },
		"round trips": func(_ *Fleet, p *Pull, by float64) { p.RTT *= by },
		"seed":        swarmed(func(s *Swarm, by float64) { s.Source *= by }),
		"uploads":     swarmed(func(s *Swarm, by float64) { s.Upload *= by }),
		"peers":       swarmed(func(s *Swarm, by float64) { s.Peers *= by }),
		"efficiency":  swarmed(func(s *Swarm, by float64) { s.Efficiency *= by }),
	}
	slowest := []string{"full pull in each of 10 guests", "whole image, once a node", "lazy, imports much",
		"whole image, Dragonfly", "lazy, imports much, Dragonfly"}
	for what, f := range change {
		for _, by := range []float64{0.5, 2} {
			took := map[string]float64{}
			for _, w := range Ways() {
				fleet, pull := w.fleet(Sizes[0]), w.pull
				f(&fleet, &pull, by)
				took[w.Name] = fleet.Run(pull).All()
			}
			for i := 1; i < len(slowest); i++ {
				if slow, fast := slowest[i-1], slowest[i]; took[slow] <= took[fast] {
					t.Errorf("%s times %.1f: %s takes %.0f s, %s %.0f s", what, by, slow, took[slow], fast, took[fast])
				}
			}
		}
	}
}

func swarmed(change func(s *Swarm, by float64)) func(*Fleet, *Pull, float64) {
	return func(f *Fleet, _ *Pull, by float64) {
		if f.Swarm != nil {
			change(f.Swarm, by)
		}
	}
}

// The fluid of a swarm against one of pieces, which knows neither rates nor shares: in
// each round every peer gives a random other one a random piece that this has not. A
// round is what a piece takes. That it is blind is what efficiency stands for.
func TestPieces(t *testing.T) {
	for _, c := range []struct {
		name   string
		nodes  int
		source float64 // pieces that the seed gets in a round
	}{
		{"slow seed", 64, 0.25},
		{"fast seed", 64, 4},
		{"many", 256, 1},
	} {
		s := &Swarm{Source: c.source, Seeds: 1, Upload: 1, Efficiency: efficiency, Piece: 1, Peers: 2}
		f := Fleet{Nodes: c.nodes, Starts: float64(c.nodes) / tick, NIC: 1, Registry: Registry{Line: 100}, Swarm: s}
		fluid, rounds := f.Run(Pull{Bytes: pieces}).All(), float64(spread(c.nodes, c.source))
		t.Logf("%s: %.0f rounds, the fluid takes %.0f", c.name, rounds, fluid)
		if factor(fluid, rounds) > 1.5 {
			t.Errorf("%s: %.0f rounds with pieces, %.0f in the fluid", c.name, rounds, fluid)
		}
	}
}

// pieces of what is spread: one bit each.
const pieces = 64

// spread is in how many rounds all nodes have all pieces. Node 0 is the seed.
func spread(nodes int, source float64) (rounds int) {
	rnd := rand.New(rand.NewPCG(1, 2))
	has, came := make([]uint64, nodes+1), make([]uint64, nodes+1)
	for left := nodes * pieces; left > 0; rounds++ {
		has[0] = 1<<min(pieces, int(source*float64(rounds+1))) - 1
		for _, from := range rnd.Perm(nodes + 1) {
			for range 16 { // tries to find somebody who needs something
				to := 1 + rnd.IntN(nodes)
				if p := missing(rnd, has[from]&^has[to]); p != 0 && came[to] == 0 {
					came[to] = p
					left--
					break
				}
			}
		}
		for i, p := range came { // what came in this round cannot go on in it
			has[i] |= p
		}
		clear(came)
	}
	return rounds
}

// missing is a random one of the bits, 0 when there is none.
func missing(rnd *rand.Rand, of uint64) uint64 {
	if of == 0 {
		return 0
	}
	begin := rnd.IntN(pieces)
	turned := bits.RotateLeft64(of, -begin)
	return bits.RotateLeft64(turned&-turned, begin)
}
