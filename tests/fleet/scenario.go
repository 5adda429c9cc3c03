package fleet

// What Tatami needs, as it was measured.
const (
	// An index of `tatami index` is 1.07 % of its compressed image (README, make
	// bench-formats: 9.9 MB of 927 MB).
	indexShare = 0.0107
	// An eStargz image of 326 MB: 97 MB of it cross the link until pandas, SciPy and
	// Django are imported, 12 MB until Python has printed a line (README, make bench).
	heavyShare = 97.0 / 326
	lightShare = 12.0 / 326
	// One sandbox without a virtual machine until its container's process runs, on a node
	// that has the image (tests/scale, BenchmarkSandboxes, eStargz, one sandbox). Several
	// at a time take that one after the other, which the same benchmark bears out: fifty,
	// on two cores, have a median of 0.13 s to 0.18 s for each.
	containerSeconds = 0.13
)

// A fleet of virtual machines: what its nodes and its registry are.
const (
	fleetImage = 1e9       // bytes, compressed
	fleetNIC   = 10 * gbit // of a node
	sandboxes  = 10        // of the image, on each node
	// A scheduler for each thousand nodes: a cluster of Kubernetes has 5,000 at most.
	nodesPerScheduler = 1000
)

// Sizes of a fleet in tables and plots.
var Sizes = []int{1000, 2000, 5000, 10000}

// Way is how an image comes to the nodes of a fleet.
type Way struct {
	Name  string
	pull  Pull
	peers bool
}

// Ways that are compared. What a node does once with plain layers is in this model the
// same for Tatami as for a pull of containerd.
func Ways() []Way {
	guests := Pull{Bytes: sandboxes * fleetImage, Layers: imageLayers, Unpack: sandboxes * unpackRate}
	once := Pull{Bytes: fleetImage, Layers: imageLayers, Unpack: unpackRate}
	heavy := lazily(fleetImage * (indexShare + heavyShare))
	light := lazily(fleetImage * (indexShare + lightShare))
	return []Way{
		{"full pull in each of 10 guests", guests, false},
		{"whole image, once a node", once, false},
		{"lazy, imports much", heavy, false},
		{"lazy, prints a line", light, false},
		{"whole image, Dragonfly", once, true},
		{"lazy, imports much, Dragonfly", heavy, true},
	}
}

// Run has so many nodes take the image, all of them with the same registry of 10 Gbit/s
// that does not throttle.
func (w Way) Run(nodes int) Result { return w.fleet(nodes).Run(w.pull) }

func (w Way) fleet(nodes int) Fleet {
	f := Fleet{Nodes: nodes, Starts: podsPerSecond * float64(nodes) / nodesPerScheduler,
		NIC: fleetNIC, Pod: podSeconds, Registry: Registry{Line: volcanoLine}}
	if w.peers {
		f.Swarm = newDragonfly(volcanoSource, volcanoPeer)
	}
	return f
}
