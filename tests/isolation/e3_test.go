package isolation

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// shareRun is what one arm of E3 found, in per cent: of what the link can carry, and of
// what it carried in tenths of a second while both wanted it.
type shareRun struct {
	samples      []sample
	began        time.Time // of batch
	both, single float64   // used while both want it, while one does
	online       []float64 // online's part, sorted
	batch        float64   // batch's part of all that was sent then
}

// e3 is who gets the link: batch reads all the time, online for a while.
func (l *lab) e3(tb testing.TB) {
	on, big := ofSize("on", l.bytes(l.length*2/5), 1<<20), ofSize("big", l.bytes(l.length), 1<<20)
	l.push("online", on.layers(tb, "online", lazy)...)
	l.push("batch", big.layers(tb, "batch", lazy)...)
	var runs [3]shareRun
	l.each(tb, func(tb testing.TB, a arm, i int) { runs[i] = l.shares(tb, a, on, big, noFill) })
	of := func(f func(shareRun) float64) (v values) {
		for i, r := range runs {
			v[i] = f(r)
		}
		return v
	}
	both := func(v values) values { v[0] = none; return v }
	l.section("E3: who gets the link", fmt.Sprintf("4 batch sandboxes read %s, and after a while 2 online ones %s; what the registry sends is sampled every 100 ms.",
		megabytes(big.total()), megabytes(on.total())))
	l.add(row{"of the link is used while one class reads", "%", of(func(r shareRun) float64 { return r.single }), atLeast(95)},
		row{"of the link is used while both read", "%", both(of(func(r shareRun) float64 { return r.both })), atLeast(95)},
		row{"online's part then: median", "%", both(of(func(r shareRun) float64 { return quantile(r.online, 0.5) })), aim{}},
		row{"batch's part then: mean", "%", both(of(func(r shareRun) float64 { return r.batch })), atLeast(3)})
	l.draw(tb, "e3-unprotected", linkChart("E3: unprotected", runs[1].samples, runs[1].began))
	l.draw(tb, "e3-protected", linkChart("E3: protected", runs[2].samples, runs[2].began))
	l.e3bounds(tb, on, big)
}

// bounds are settings that E3 is run with once more.
const bounds = noFill + "share = 50\nfloor = \"20%\"\n[classes.batch]\nshare = 50\nceiling = \"80%\"\n"

func (l *lab) e3bounds(tb testing.TB, on, big content) {
	var r shareRun
	within(tb, func(tb testing.TB) { r = l.shares(tb, protected, on, big, bounds) })
	l.section("E3 with bounds", "The same where both classes have the same share, online a floor of 20 %, and batch a ceiling of 80 %.")
	l.add(row{"of the link is used while batch reads", "%", values{none, none, r.single}, atMost(82)},
		row{"of the link is used while both read", "%", values{none, none, r.both}, atLeast(95)},
		row{"online's part then: the least tenth", "%", values{none, none, quantile(r.online, 0.1)}, atLeast(20)})
	l.draw(tb, "e3-bounds", linkChart("E3: a floor and a ceiling", r.samples, r.began))
}

func (l *lab) shares(tb testing.TB, a arm, on, big content, settings string) (r shareRun) {
	n := newNode(tb, a, l.site, settings)
	online := n.newStorm(tb, "online", 2, l.ref("online"), on.names())
	batch := &storm{}
	if a.storm {
		batch = n.newStorm(tb, "batch", 4, l.ref("batch"), big.names())
	}
	l.limit(true)
	watched := l.watch([]string{"online"}, []string{"batch"})
	r.began = time.Now()
	end := batch.begin()
	time.Sleep(l.length / 4)
	first, err := online.begin()()
	check(tb, err)
	second, err := end()
	check(tb, err)
	r.samples = watched()
	if !a.storm {
		r.single = 100 * l.used(r.samples, first.began, first.ended)
		return r
	}
	r.single = 100 * l.used(r.samples, second.began, first.began)
	r.both = 100 * l.used(r.samples, first.began, minTime(first.ended, second.ended))
	wanted := span(r.samples, first.began.Add(edge), minTime(first.ended, second.ended).Add(-edge))
	r.online = parts(wanted)
	r.batch = batchPart(wanted)
	return r
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// edge is left out at both ends of a span: a pull fetches no layers.
const edge = 700 * time.Millisecond

// used is what was sent between two moments against what the link could carry.
func (l *lab) used(all []sample, from, to time.Time) float64 {
	all = span(all, from.Add(edge), to.Add(-edge))
	if len(all) < 2 || l.shape.Rate == 0 {
		return none
	}
	a, b := all[0], all[len(all)-1]
	return float64(b.online+b.batch-a.online-a.batch) / b.at.Sub(a.at).Seconds() / float64(l.shape.Rate)
}

// batchPart is that of batch in all that was sent between samples, in per cent.
func batchPart(all []sample) float64 {
	if len(all) < 2 {
		return none
	}
	a, b := all[0], all[len(all)-1]
	return 100 * float64(b.batch-a.batch) / float64(b.batch+b.online-a.batch-a.online)
}

func span(all []sample, from, to time.Time) []sample {
	return slices.DeleteFunc(slices.Clone(all), func(s sample) bool { return s.at.Before(from) || s.at.After(to) })
}

// parts of online in what was sent between samples, in per cent, sorted.
func parts(all []sample) (out []float64) {
	for i := 1; i < len(all); i++ {
		online, batch := all[i].online-all[i-1].online, all[i].batch-all[i-1].batch
		if online+batch > 0 {
			out = append(out, 100*float64(online)/float64(online+batch))
		}
	}
	slices.Sort(out)
	return out
}
