package isolation

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// e5 is the processor: plain gzip layers of batch, which the node inflates and indexes,
// over a link that is not the bottleneck.
func (l *lab) e5(tb testing.TB) {
	warm, cold := ofSize("warm", 96<<20, 16<<20), ofSize("cold", 256<<20, 16<<20)
	l.push("online", append(warm.layers(tb, "warm", lazy), cold.layers(tb, "cold", lazy)...)...)
	pack := content{dir: "pack", files: 24, size: 1 << 20, packs: true}
	var images []string
	for i := range l.boxes {
		name := fmt.Sprintf("batch%d", i)
		l.push(name, pack.layers(tb, name, plain)...)
		images = append(images, l.ref(name))
	}
	l.shape.Rate = 0
	var runs [3]faultRun
	var spins [3][]float64
	l.each(tb, func(tb testing.TB, a arm, i int) {
		c := spawn(tb, "spin", nil, spinJob{Every: 10 * time.Millisecond, Units: 1_000_000})
		runs[i] = l.faults(tb, a, faultTest{warm: warm, cold: cold, rates: [kindsOfFaults]int{4, 40, 956}, storm: func(tb testing.TB, n *node) *storm {
			st := &storm{}
			for _, image := range images {
				st.add(n.launch(tb, "batch"), image, pack.names())
			}
			return st
		}})
		var r spinResult
		check(tb, c.stop(&r))
		for _, d := range r.Took {
			spins[i] = append(spins[i], float64(d)/1e6)
		}
		slices.Sort(spins[i])
	})
	l.section("E5: the processor", fmt.Sprintf("%d batch sandboxes start, each from an image of its own of %s in a plain gzip layer, which the node inflates and indexes; the link has no bound. Online computes for a moment 100 times a second, beside its faults.",
		l.boxes, megabytes(pack.total())))
	l.addFaults(runs, aim{})
	l.addStorm(runs)
	l.add(row{"online computes: median", "ms", values{quantile(spins[0], 0.5), quantile(spins[1], 0.5), quantile(spins[2], 0.5)}, aim{}},
		row{"99 %", "ms", values{quantile(spins[0], 0.99), quantile(spins[1], 0.99), quantile(spins[2], 0.99)}, aim{}})
}
