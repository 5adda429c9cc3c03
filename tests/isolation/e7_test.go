package isolation

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// e7 is what a storm costs a registry that refuses some of it: every tenth request for
// a layer is answered with 429 and a second to wait.
func (l *lab) e7(tb testing.TB) {
	app := ofSize("app", 64<<20, 1<<20)
	l.push("batch", app.layers(tb, "app", lazy)...)
	pod := content{dir: "app", files: 32, size: 256 << 10}
	l.push("online", pod.layers(tb, "pod", lazy)...)
	var bytes, requests, refused, ready values
	l.each(tb, func(tb testing.TB, a arm, i int) {
		l.Reset()
		var asked, no atomic.Int64
		end := l.FaultFunc(func(r *http.Request) bool {
			ours := blobs("batch")(r) && asked.Add(1)%10 == 0
			if ours {
				no.Add(1)
			}
			return ours
		}, 0, registrytest.Status(http.StatusTooManyRequests, "Retry-After", "1"))
		defer end()
		ready[i] = l.beside(tb, a, app, pod).Seconds()
		sent, asks := l.sent("batch")
		bytes[i], requests[i], refused[i] = float64(sent)/float64(l.size("batch")), float64(asks), float64(no.Load())
		if !a.storm {
			bytes[i], requests[i], refused[i] = none, none, none
		}
	})
	l.section("E7: kindness to the registry", fmt.Sprintf(
		"%d batch sandboxes of one image read all of it (%s), while the registry refuses every tenth request of theirs with 429; beside them an online pod starts.",
		l.boxes, megabytes(app.total())))
	l.add(row{"bytes sent, against the image", "×", bytes, atMost(1.1)},
		row{"requests that were answered", "", requests, aim{}},
		row{"refused", "", refused, aim{}},
		row{"the online pod is ready after", "s", ready, aim{}})
}

// beside starts sandboxes that all read the same, and a pod a second later; it returns
// how long that took.
func (l *lab) beside(tb testing.TB, a arm, app, pod content) time.Duration {
	n := newNode(tb, a, l.site, "")
	l.limit(true)
	b := n.newSandbox(tb, "online")
	all := &storm{}
	if a.storm {
		for range l.boxes {
			all.add(n.launch(tb, "batch"), l.ref("batch"), app.names())
		}
	}
	end := all.begin()
	time.Sleep(time.Second)
	took := b.start(tb, l.ref("online"), pod.names())
	_, err := end()
	check(tb, err)
	return took
}
