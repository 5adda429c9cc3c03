package isolation

import (
	"testing"
)

// BenchmarkIsolation runs the experiments. TATAMI_ISOLATION_LINK (200mbit,5ms) is the
// link before the registry, TATAMI_ISOLATION_SANDBOXES (20) how many there are in a
// storm, TATAMI_ISOLATION_STORM (20s) how long it lasts when the link is full;
// TATAMI_ISOLATION_OUT gets the table and the charts.
func BenchmarkIsolation(b *testing.B) {
	need(b)
	r := newReport(b)
	for _, e := range []struct {
		name string
		run  func(*lab, testing.TB)
	}{
		{"E1", (*lab).e1},
		{"E2", (*lab).e2},
		{"E3", (*lab).e3},
		{"E4", (*lab).e4},
		{"E5", (*lab).e5},
		{"E6", (*lab).e6},
		{"E7", (*lab).e7},
		{"E8", (*lab).e8},
		{"E9", (*lab).e9},
		{"E10", (*lab).e10},
		{"Profile", (*lab).profile},
	} {
		b.Run(e.name, func(b *testing.B) {
			within(b, func(tb testing.TB) { e.run(newLab(tb, r), tb) })
			r.save(b)
		})
	}
}
