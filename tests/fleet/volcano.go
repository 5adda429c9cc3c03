package fleet

// The published runs of Volcano Engine: pods of one image that start at the same time,
// one on each node, until the last is there (dragonflyoss/d7y.io,
// blog/2023-04-13-volcano-engine-distributed-image-acceleration-practice-based-on-dragonfly:
// values printed on the bars of its charts, and its section Environment; Dragonfly 2.0.8).
const (
	gbit = 1e9 / 8
	mib  = 1 << 20
	gib  = 1 << 30

	volcanoLine = 10 * gbit // "Container Repository : Bandwidth 10Gbit/s"
	volcanoPeer = 6 * gbit  // "Dragonfly Peer : … Bandwidth 6Gbit/s"
	// The images, by the chart of traffic: 27.39 and 156.74 GiB for 50 pods.
	volcanoNginx      = 27.39 * gib / 50
	volcanoTensorFlow = 156.74 * gib / 50
)

// Fitted to single points of the same charts; the other points are what the model is
// held against.
const (
	// The chart of traffic says that each pod fetched the image once and no byte twice,
	// also where 500 pods took ten times as long as the line needs: the registry sent
	// slowly, as one does whose allowance is used up ("limited by the bandwidth and QPS
	// of TOS"). 313.8 GiB took 1380 s and 626.9 GiB 4245 s (TensorFlow, OCI, 100 and 200
	// pods), so sustained it sends 313.1 GiB in 2865 s, and 313.8 GiB - 1380 s of that
	// came before.
	volcanoSustained = 313.1 * gib / 2865
	volcanoBurst     = 313.8*gib - 1380*volcanoSustained
	// TensorFlow by Dragonfly, 50 pods: 40 s, less the pod and the unpacking of the last
	// layer. Beside it the chart of peak bandwidth has 61 to 111 MiB/s.
	volcanoSource = 100 * mib
	// Nginx by Dragonfly and Nydus, 50 pods: 5 s, less the second in which pods are made.
	podSeconds = 4
)

// Of the software, by its documentation or by others' measurements.
const (
	// kube-scheduler binds 50 pods a second: its default of --kube-api-qps.
	podsPerSecond = 50
	// One core inflates gzip and writes it with so many compressed bytes a second, and
	// containerd unpacks layers one after the other: assumed, as are ten layers. No order
	// of ways hangs on it (TestOrder).
	unpackRate  = 100e6
	imageLayers = 10
	// A container reads 6.4 % of its image (Harter et al., Slacker, FAST 2016).
	slackerShare = 0.064
	// Dragonfly cuts a task into pieces of at least 4 MiB (X-Dragonfly-Piece-Length); a
	// round trip within a data centre.
	piece     = 4 * mib
	nearRTT   = 1e-3
	lazyRange = 1 * mib // what Tatami, and Nydus with its default, ask for at a time
	// Where peers give each other pieces blindly, half of what they could upload is of use
	// (TestPieces); a scheduler that sees all of them does better.
	efficiency = 0.5
	peersEach  = 4 // Dragonfly's scheduler gives a peer that many parents (candidateParentLimit)
)

// Ways in which Volcano Engine started pods.
const (
	oci            = "OCI"
	dragonfly      = "Dragonfly"
	dragonflyNydus = "Dragonfly+Nydus"
)

// volcano is one of the published runs, in the model.
func volcano(way string, pods int, image float64) Result {
	f := Fleet{Nodes: pods, Starts: podsPerSecond, NIC: volcanoPeer, Pod: podSeconds,
		Registry: Registry{Line: volcanoLine, Burst: volcanoBurst, Sustained: volcanoSustained}}
	if way != oci {
		f.Swarm = newDragonfly(volcanoSource, volcanoPeer)
	}
	if way == dragonflyNydus {
		return f.Run(lazily(image * slackerShare))
	}
	return f.Run(Pull{Bytes: image, Layers: imageLayers, Unpack: unpackRate})
}

func newDragonfly(source, upload float64) *Swarm {
	return &Swarm{Source: source, Seeds: 1, Upload: upload, Efficiency: efficiency, Piece: piece, Peers: peersEach, RTT: nearRTT}
}

// lazily fetches bytes by one range after the other.
func lazily(bytes float64) Pull {
	return Pull{Bytes: bytes, Requests: bytes / lazyRange, RTT: nearRTT}
}
