// Package fleet computes how long many nodes take to start one image, from the rates of
// a registry, of network cards and of a peer-to-peer network. It is a fluid model: bytes
// flow at rates that change at events, and between two events all is linear, so a run is
// exact and gives the same every time. `make bench-fleet` draws it for 1,000 to 10,000
// nodes; the tests hold it against curves that others have published.
//
// # Symbols
//
//	N    nodes, told to start at a rate of P a second
//	B    bytes that a node fetches before its containers are ready
//	d    what a node's network card takes, u what a peer uploads; bytes a second
//	C    what the registry sends, bytes a second
//	s    what a seed peer gets from the registry, bytes a second
//	L    layers of the image, w compressed bytes that a node unpacks in a second
//
// # Registry
//
// Of n nodes that fetch at a time each gets the same (processor sharing, as of TCP
// connections of equal round-trip time over one link):
//
//	r(t) = min(d, C(t) / n(t))
//
// C is the line's rate; of a registry that throttles it is that for as long as an
// allowance lasts (a token bucket that fills at the sustained rate), then the sustained
// rate.
//
// # Peers
//
// One seed fetches the image from the registry once, from time 0 on, and has
// F(t) = min(B, s·t) of it. A peer has x(t) ≤ F(t). Who has all that there is (x = F)
// goes on at the rate of F; the others catch up. Together they get what all upload,
//
//	U(t) = u · (seeds + η·peers(t))
//
// shared max-min fairly with d as the most for each (Qiu and Srikant, SIGCOMM 2004, with
// η how much of a peer's upload is of use to others). For all nodes at once this is the
// bound of Kumar and Ross (IEEE HotWeb 2006), max(B/s, B/d, N·B/U). What a fluid has
// not, the way of the first piece through the network, is added:
// ⌈log_k N⌉ · (piece/u + rtt), with k peers that one serves at a time.
//
// # Node
//
// A node that has fetched for D seconds is ready after
//
//	unpacked:  max(D + B/(L·w), D/L + B/w)      L equal layers, one unpacked after the other
//	lazy:      D + requests·rtt                  nothing is unpacked
//
// and, both, the time of a pod without its image.
//
// # Neglected
//
// Slow start and loss of TCP; requests that fail and the kubelet's back-off, except as
// they are in a sustained rate; layers that are on the node already; that nodes differ;
// disks; switches between racks (every node gets its d); peers that go away, and those
// that ask the registry themselves (of Dragonfly's published runs up to half an image in
// all, TestTraffic), and that a fleet of several clusters has a Dragonfly in each, and
// so fetches once for each; the CPU of peers; the pieces that a lazy reader waits for in an
// order of its own. So the model is for what a fleet does to a registry and the other way
// round, not for differences of tenths of a second.
package fleet
