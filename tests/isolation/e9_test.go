package isolation

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"
)

// Of E9: where in a block of registryBlock bytes batch reads a page, and where online
// does while what batch started has not got there.
const (
	batchPage  = 0
	onlinePage = 640 << 10
	lead       = 20 * time.Millisecond
)

// e9 is priority inversion: online needs a chunk that batch is fetching already.
func (l *lab) e9(tb testing.TB) {
	both := ofSize("both", 200<<20, registryBlock)
	big := ofSize("big", l.bytes(l.length), 1<<20)
	l.push("online", both.layers(tb, "both", lazy)...)
	l.push("batch", big.layers(tb, "batch", lazy)...)
	var half, most, twice values
	l.each(tb, func(tb testing.TB, a arm, i int) {
		waits, sent := l.inversion(tb, a, both, big)
		half[i], most[i] = quantile(waits, 0.5), quantile(waits, 0.99)
		twice[i] = sent
	})
	l.section("E9: online needs what batch is fetching", fmt.Sprintf(
		"A batch sandbox reads a page, %v later an online one a page %d KiB behind it, which the fetch for the first brings along; %d more batch sandboxes read %s.",
		lead, onlinePage>>10, l.boxes, megabytes(big.total())))
	l.add(row{"online waits: median", "ms", half, aim{}}, row{"99 %", "ms", most, aim{}},
		row{"fetched, against the distinct bytes", "×", twice, atMost(1.1)})
}

// inversion returns how long online waited each time, in milliseconds, sorted, and how
// many bytes were sent for a block.
func (l *lab) inversion(tb testing.TB, a arm, both, big content) (waits []float64, sent float64) {
	n := newNode(tb, a, l.site, noFill)
	l.limit(true)
	l.Reset()
	online, batch := n.newSandbox(tb, "online"), n.newSandbox(tb, "batch")
	check(tb, online.pull(tb.Context(), l.ref("online")))
	check(tb, batch.pull(tb.Context(), l.ref("online")))
	others := &storm{}
	if a.storm {
		others = n.newStorm(tb, "batch", l.boxes, l.ref("batch"), big.names())
	}
	first, second := batch.newToucher(tb), online.newToucher(tb)
	end := others.begin()
	time.Sleep(l.length / 10)
	began, blocks := time.Now(), 0
	before, _ := l.sent("online")
	for _, name := range both.names() {
		if time.Since(began) > l.length*3/4 {
			break
		}
		took, err := invert(first, second, name)
		check(tb, err)
		waits, blocks = append(waits, float64(took)/1e6), blocks+1
	}
	after, _ := l.sent("online")
	_, err := end()
	check(tb, err)
	slices.Sort(waits)
	return waits, math.Ceil(1000*float64(after-before)/float64(blocks*registryBlock)) / 1000
}

// invert has batch begin and online follow; it returns when both have their page.
func invert(batch, online *toucher, name string) (time.Duration, error) {
	done := make(chan error, 1)
	go func() {
		_, err := batch.touch(name, batchPage)
		done <- err
	}()
	time.Sleep(lead)
	took, err := online.touch(name, onlinePage)
	if err2 := <-done; err == nil {
		err = err2
	}
	return took, err
}
