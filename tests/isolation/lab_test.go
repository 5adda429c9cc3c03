package isolation

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tools/link"
)

// lab is what experiments share: their size, a registry with images, a report.
type lab struct {
	*site
	*report
	boxes  int           // batch sandboxes of a storm
	length time.Duration // that a storm takes when it has the link for itself
}

// newLab makes one of the size that the environment says.
func newLab(tb testing.TB, r *report) *lab {
	tb.Helper()
	shape, err := link.ParseShape(cmp.Or(os.Getenv("TATAMI_ISOLATION_LINK"), "200mbit,5ms"))
	check(tb, err)
	boxes, err := strconv.Atoi(cmp.Or(os.Getenv("TATAMI_ISOLATION_SANDBOXES"), "20"))
	check(tb, err)
	length, err := time.ParseDuration(cmp.Or(os.Getenv("TATAMI_ISOLATION_STORM"), "20s"))
	check(tb, err)
	return &lab{site: newSite(tb, shape), report: r, boxes: boxes, length: length}
}

// bytes are what the link carries in a time.
func (l *lab) bytes(d time.Duration) int64 { return int64(float64(l.shape.Rate) * d.Seconds()) }

// ofSize is content of a total size, in files of a size.
func ofSize(dir string, total int64, file int) content {
	return content{dir: dir, size: file, files: max(1, int(total/int64(file)))}
}

// each runs f in every arm with a rig whose processes end with it.
func (l *lab) each(tb testing.TB, f func(tb testing.TB, a arm, i int)) {
	tb.Helper()
	for i, a := range arms {
		within(tb, func(tb testing.TB) { f(tb, a, i) })
	}
}

// scope is a testing.TB whose clean-ups run earlier than those of the whole.
type scope struct {
	testing.TB
	cleanups []func()
}

func (s *scope) Cleanup(f func()) { s.cleanups = append(s.cleanups, f) }

// within runs f, and its clean-ups when it has ended or failed.
func within(tb testing.TB, f func(tb testing.TB)) {
	tb.Helper()
	s := &scope{TB: tb}
	defer func() {
		for len(s.cleanups) > 0 {
			last := s.cleanups[len(s.cleanups)-1]
			s.cleanups = s.cleanups[:len(s.cleanups)-1]
			last()
		}
	}()
	f(s)
}

// warmUp has a sandbox read files of an image over an unlimited link, and starts the
// node anew: it has them then, and has measured nothing.
func (n *node) warmUp(tb testing.TB, s *site, image string, names []string) {
	tb.Helper()
	s.limit(false)
	b := n.newSandbox(tb, "online")
	check(tb, b.pull(context.Background(), image))
	b.mustRead(tb, names)
	b.close()
	n.restart()
	s.limit(true)
}

func (l *lab) shapeText() string {
	return fmt.Sprintf("%s/s, %v", megabytes(l.shape.Rate), l.shape.RTT)
}
