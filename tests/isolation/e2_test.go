package isolation

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// starts is how many online pods start, one after the other, while the storm lasts.
const starts = 5

// e2 is the cold start of online pods: from the pull until what they read first is read.
func (l *lab) e2(tb testing.TB) {
	app := content{dir: "app", files: 32, size: 256 << 10}
	for i := range starts {
		name := fmt.Sprintf("online%d", i)
		l.push(name, app.layers(tb, name, lazy)...)
	}
	big := ofSize("big", l.bytes(l.length), 1<<20)
	l.push("batch", big.layers(tb, "batch", lazy)...)
	var half, worst values
	span := values{none}
	l.each(tb, func(tb testing.TB, a arm, i int) {
		ready, st := l.startPods(tb, a, app, big)
		half[i], worst[i] = quantile(ready, 0.5), ready[len(ready)-1]
		if a.storm {
			span[i] = st.seconds()
		}
	})
	l.section("E2: an online pod starts in the storm", fmt.Sprintf(
		"%d pods, one after the other, each of an image that is not on the node, read %s of it; meanwhile %d batch sandboxes read %s.",
		starts, megabytes(app.total()), l.boxes, megabytes(big.total())))
	l.add(row{"ready: median", "s", half, aim{}}, row{"the slowest", "s", worst, aim{}},
		row{"all of batch is done after", "s", span, timesUnprotected(1.1)})
}

// startPods returns how many seconds each took, sorted.
func (l *lab) startPods(tb testing.TB, a arm, app, big content) (ready []float64, st stormResult) {
	n := newNode(tb, a, l.site, "")
	l.limit(true)
	var boxes []*sandbox
	for range starts {
		boxes = append(boxes, n.newSandbox(tb, "online"))
	}
	pods := &storm{}
	if a.storm {
		pods = n.newStorm(tb, "batch", l.boxes, l.ref("batch"), big.names())
	}
	end := pods.begin()
	time.Sleep(l.length / 10)
	for i, b := range boxes {
		ready = append(ready, b.start(tb, l.ref(fmt.Sprintf("online%d", i)), app.names()).Seconds())
	}
	st, err := end()
	check(tb, err)
	slices.Sort(ready)
	return ready, st
}
