package isolation

import (
	"fmt"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/chart"
)

// faultRun is what one arm of E1 found.
type faultRun struct {
	probe   probeResult
	storm   stormResult
	samples []sample
	cpu     time.Duration // of tatami-host while the storm lasted
	use     float64       // of the link's rate while the storm lasted
}

// e1 is the page-fault tail: faults of an online sandbox while batch sandboxes start.
func (l *lab) e1(tb testing.TB) {
	warm := ofSize("warm", 128<<20, 16<<20)
	cold := ofSize("cold", int64(float64(defaultRates[atRegistry])*registryBlock*3*l.length.Seconds()), 16<<20)
	big := ofSize("big", l.bytes(l.length), 1<<20)
	l.push("online", append(warm.layers(tb, "warm", lazy), cold.layers(tb, "cold", lazy)...)...)
	l.push("batch", big.layers(tb, "batch", lazy)...)
	var runs [3]faultRun
	l.each(tb, func(tb testing.TB, a arm, i int) {
		runs[i] = l.faults(tb, a, faultTest{warm: warm, cold: cold, rates: defaultRates, storm: func(tb testing.TB, n *node) *storm {
			return n.newStorm(tb, "batch", l.boxes, l.ref("batch"), big.names())
		}})
	})
	l.section("E1: page faults of an online sandbox", fmt.Sprintf(
		"%d batch sandboxes start, and read %s of an image over a link of %s/s.", l.boxes, megabytes(big.total()), megabytes(l.shape.Rate)))
	l.addFaults(runs, timesAlone(1.10))
	l.addStorm(runs)
	l.draw(tb, "e1-faults", chart.Chart{Title: "E1: faults at the registry that take longer", X: "ms", Y: "share", Lines: faultLines(runs, atRegistry)})
	l.draw(tb, "e1-time", chart.Chart{Title: "E1: faults at the registry over time", X: "seconds", Y: "ms", LinearX: true, Lines: timeLines(runs, atRegistry)})
	l.draw(tb, "e1-link", linkChart("E1: what the link carries, protected", runs[2].samples, runs[2].storm.began))
	l.draw(tb, "e1-link-unprotected", linkChart("E1: what the link carries, unprotected", runs[1].samples, runs[1].storm.began))
}

// faultTest is what one arm does.
type faultTest struct {
	warm, cold content // of the image "online"
	rates      [kindsOfFaults]int
	storm      func(testing.TB, *node) *storm
	during     func(testing.TB, *node) // goes on beside the storm
}

// faults runs one arm: faults for as long as the storm takes, or would take alone.
func (l *lab) faults(tb testing.TB, a arm, f faultTest) (r faultRun) {
	n := newNode(tb, a, l.site, noFill)
	n.warmUp(tb, l.site, l.ref("online"), f.warm.names())
	b := n.newSandbox(tb, "online")
	check(tb, b.pull(tb.Context(), l.ref("online")))
	st := &storm{}
	if a.storm {
		st = f.storm(tb, n)
	}
	c := spawn(tb, "probe", nil, probeJob{Registry: b.files(f.cold.names()), Node: b.files(f.warm.names()), Rates: f.rates})
	time.Sleep(2 * time.Second) // the prober and the node have found their pace
	watched, before := l.watch([]string{"online"}, []string{"batch"}), n.usage()
	began, end := time.Now(), st.begin()
	if f.during != nil {
		f.during(tb, n)
	}
	var err error
	r.storm, err = end()
	check(tb, err)
	if !a.storm {
		time.Sleep(time.Until(began.Add(l.length)))
		r.storm.ended = time.Now()
	}
	r.cpu = n.usage().cpu - before.cpu
	r.samples = watched()
	check(tb, c.stop(&r.probe))
	r.probe.cut(r.storm.began, r.storm.ended)
	r.use = l.used(r.samples, r.storm.began, r.storm.ended)
	if r.probe.Out {
		tb.Logf("%s: the prober had no pages left", a.name)
	}
	return r
}

// cut leaves the faults between two moments.
func (r *probeResult) cut(from, to time.Time) {
	kept := r.Faults[:0]
	for _, f := range r.Faults {
		if f.At >= from.UnixNano() && f.At <= to.UnixNano() {
			kept = append(kept, f)
		}
	}
	r.Faults = kept
}

func (l *lab) addFaults(runs [3]faultRun, goal aim) {
	of := func(q float64, kinds ...int) (v values) {
		for i, r := range runs {
			v[i] = quantile(r.probe.times(kinds...), q)
		}
		return v
	}
	for k, name := range kindNames[:2] {
		l.add(row{fmt.Sprintf("faults %s: median", name), "ms", of(0.5, k), aim{}},
			row{"99 %", "ms", of(0.99, k), goal})
	}
	l.add(row{"all faults: 99 %", "ms", of(0.99, atRegistry, onNode, inMemory), goal},
		row{"99.9 %", "ms", of(0.999, atRegistry, onNode, inMemory), goal})
	var stalls, errors values
	for i, r := range runs {
		errors[i] = float64(r.probe.Errors + len(r.storm.errors))
		for _, f := range r.probe.Faults {
			if f.Took > int64(100*time.Millisecond) {
				stalls[i]++
			}
		}
	}
	l.add(row{"longer than 100 ms", "", stalls, aim{}}, row{"input/output errors", "", errors, atMost(0)})
}

func (l *lab) addStorm(runs [3]faultRun) {
	span, use, cpu := values{none}, values{none}, values{none}
	for i := 1; i < 3; i++ {
		span[i], use[i], cpu[i] = runs[i].storm.seconds(), 100*runs[i].use, runs[i].cpu.Seconds()
	}
	l.add(row{"all of batch is done after", "s", span, timesUnprotected(1.1)},
		row{"of the link is used", "%", use, atLeast(95)},
		row{"CPU of tatami-host", "s", cpu, aim{}})
}

func faultLines(runs [3]faultRun, kind int) (lines []chart.Line) {
	for i, r := range runs {
		lines = append(lines, distribution(arms[i].name, r.probe.times(kind), i))
	}
	return lines
}

// timeLines are how long faults took, over when they were, in seconds.
func timeLines(runs [3]faultRun, kind int) (lines []chart.Line) {
	for i, r := range runs {
		line := chart.Line{Name: arms[i].name, Colour: i, Dots: true}
		for _, f := range r.probe.Faults {
			if f.Kind == kind {
				at := time.Unix(0, f.At).Sub(r.storm.began).Seconds()
				line.Points = append(line.Points, [2]float64{at, float64(f.Took) / 1e6})
			}
		}
		lines = append(lines, line)
	}
	return lines
}
