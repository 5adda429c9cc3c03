package isolation

import (
	"context"
	"fmt"
	"testing"
)

// cacheSize is the node's store in E4, bytes.
const cacheSize = 192 << 20

// scans is in how many parts batch reads three times that.
const scans = 6

// e4 is the node's cache: a batch job reads three times what the node keeps, and online
// sandboxes read the same half of it again and again.
func (l *lab) e4(tb testing.TB) {
	work := ofSize("work", cacheSize/2, 1<<20)
	scan := ofSize("scan", 3*cacheSize, 1<<20)
	l.push("online", work.layers(tb, "work", lazy)...)
	l.push("batch", scan.layers(tb, "scan", lazy)...)
	var lost values
	l.each(tb, func(tb testing.TB, a arm, i int) { lost[i] = l.misses(tb, a, work, scan) })
	l.section("E4: a scan and the node's cache", fmt.Sprintf("Batch reads %s once, the node keeps %s; online sandboxes, of which each reads %s, start before, between and after.",
		megabytes(scan.total()), megabytes(cacheSize), megabytes(work.total())))
	l.add(row{"online's hit rate loses", "points", lost, atMost(5)})
}

// misses is how many per cent of what online reads the node has to fetch again.
func (l *lab) misses(tb testing.TB, a arm, work, scan content) float64 {
	n := newNode(tb, a, l.site, "")
	n.settings += fmt.Sprintf("[store]\nsize = \"%dM\"\n", cacheSize>>20)
	n.restart()
	l.limit(false)
	for range 3 { // so it is known as used more than once
		l.once(tb, n, "online", l.ref("online"), work.names())
	}
	before, _ := l.sent("online")
	names := scan.names()
	for i := range scans {
		if a.storm {
			l.once(tb, n, "batch", l.ref("batch"), names[i*len(names)/scans:(i+1)*len(names)/scans])
		}
		l.once(tb, n, "online", l.ref("online"), work.names())
	}
	after, _ := l.sent("online")
	return 100 * float64(after-before) / float64(scans*work.total())
}

// once has a sandbox start, read and end.
func (l *lab) once(tb testing.TB, n *node, class, image string, names []string) {
	tb.Helper()
	b := n.newSandbox(tb, class)
	check(tb, b.pull(context.Background(), image))
	b.mustRead(tb, names)
	b.close()
}
