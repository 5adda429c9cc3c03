package isolation

import (
	"fmt"
	"testing"
	"time"
)

// Of E8: how long the registry says nothing, and what of it goes over the link at that
// time.
const (
	frozen     = 30 * time.Second
	frozenRate = "1kbit"
)

// e8 is failures while a storm lasts: the node's daemon is killed, the registry freezes.
func (l *lab) e8(tb testing.TB) {
	warm := ofSize("warm", 192<<20, 16<<20)
	cold := ofSize("cold", int64(3*(l.length+frozen).Seconds())*registryBlock, 16<<20)
	big := ofSize("big", l.bytes(l.length), 1<<20)
	l.push("online", append(warm.layers(tb, "warm", lazy), cold.layers(tb, "cold", lazy)...)...)
	l.push("batch", big.layers(tb, "batch", lazy)...)
	var errors, killed, thawed values
	l.each(tb, func(tb testing.TB, a arm, i int) {
		var kill, thaw time.Time
		r := l.faults(tb, a, faultTest{warm: warm, cold: cold, rates: [kindsOfFaults]int{2, 40, 100}, storm: func(tb testing.TB, n *node) *storm {
			return n.newStorm(tb, "batch", l.boxes, l.ref("batch"), big.names())
		}, during: func(tb testing.TB, n *node) {
			time.Sleep(l.length / 4)
			kill = time.Now()
			n.crash()
			time.Sleep(l.length / 4)
			l.freeze(tb)
			thaw = time.Now()
		}})
		errors[i] = float64(r.probe.Errors + len(r.storm.errors))
		killed[i] = r.probe.after(onNode, kill).Seconds()
		thawed[i] = r.probe.after(atRegistry, thaw).Seconds()
	})
	l.section("E8: failures in the storm", fmt.Sprintf("tatami-host is killed (SIGKILL) and started again; then the registry's link stands still for %v.", frozen))
	l.add(row{"input/output errors, all sandboxes", "", errors, atMost(0)},
		row{"a page on the node is there after the kill", "s", killed, aim{}},
		row{"a page of the registry after the freeze", "s", thawed, aim{}})
}

// freeze has nothing pass the link for a while. What is in its queue stays there.
func (l *lab) freeze(tb testing.TB) {
	tb.Helper()
	l.rate(frozenRate)
	time.Sleep(frozen)
	l.limit(true)
}

// after is how long after a moment the first page that is asked for then is there.
func (r *probeResult) after(kind int, from time.Time) time.Duration {
	first := time.Duration(-1)
	for _, f := range r.Faults {
		if took := time.Duration(f.At + f.Took - from.UnixNano()); f.Kind == kind && f.At >= from.UnixNano() && (first < 0 || took < first) {
			first = took
		}
	}
	return first
}
