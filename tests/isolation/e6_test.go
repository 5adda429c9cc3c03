package isolation

import (
	"context"
	"fmt"
	"testing"
)

// e6 is the node's memory: sandboxes of one image, of which each reads all of it.
func (l *lab) e6(tb testing.TB) {
	app := ofSize("app", 32<<20, 1<<20)
	l.push("online", app.layers(tb, "app", lazy)...)
	var one, more, guest values
	l.each(tb, func(tb testing.TB, a arm, i int) {
		n := newNode(tb, a, l.site, "")
		l.limit(false)
		n.holding(tb, l.ref("online"), app, 1)
		one[i], more[i], guest[i] = mebibytes(n.usage().resident), none, none
		if !a.storm {
			return
		}
		boxes := n.holding(tb, l.ref("online"), app, l.boxes)
		more[i] = (mebibytes(n.usage().resident) - one[i]) / float64(l.boxes)
		guest[i] = 0
		for _, b := range boxes {
			guest[i] += mebibytes(b.usage().resident) / float64(l.boxes)
		}
	})
	l.section("E6: memory of a further sandbox", fmt.Sprintf(
		"One sandbox, and then %d more, of one image, of which each has read %s and goes on. Proportional set sizes: the page cache is not in them.",
		l.boxes, megabytes(app.total())))
	l.add(row{"tatami-host with one", "MiB", one, aim{}},
		row{"each further one: tatami-host", "MiB", more, aim{}},
		row{"each further one: tatami-guest", "MiB", guest, aim{}})
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// holding starts sandboxes that have read an image and stay.
func (n *node) holding(tb testing.TB, image string, c content, count int) (boxes []*sandbox) {
	tb.Helper()
	for range count {
		b := n.newSandbox(tb, "online")
		check(tb, b.pull(context.Background(), image))
		b.mustRead(tb, c.names())
		boxes = append(boxes, b)
	}
	return boxes
}
