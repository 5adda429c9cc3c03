package isolation

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/chart"
)

// values of a measure in the three columns of a table; NaN where there is none.
type values [3]float64

var none = math.NaN()

// row is one measure of an experiment.
type row struct {
	what, unit string
	values     values
	aim        aim
}

// aim is what a measure has to be for what we promise.
type aim struct {
	text string
	met  func(v values) bool
}

func timesAlone(most float64) aim {
	return aim{fmt.Sprintf("≤ %.2f× alone", most), func(v values) bool { return v[2] <= most*v[0] }}
}

func timesUnprotected(most float64) aim {
	return aim{fmt.Sprintf("≤ %.1f× unprotected", most), func(v values) bool { return v[2] <= most*v[1] }}
}

func atLeast(least float64) aim {
	return aim{fmt.Sprintf("≥ %g", least), func(v values) bool { return v[2] >= least }}
}

func atMost(most float64) aim {
	return aim{fmt.Sprintf("≤ %g", most), func(v values) bool { return v[2] <= most }}
}

// report collects what experiments found.
type report struct {
	dir  string
	text strings.Builder
}

// section begins an experiment; how says what was done. Columns are the arms when there
// are none.
func (r *report) section(name, how string, columns ...string) {
	if len(columns) == 0 {
		columns = []string{alone.name, unprotected.name, protected.name}
	}
	fmt.Fprintf(&r.text, "\n### %s\n\n%s\n\n| | %s | aim | met |\n|---|---|---|---|---|---|\n", name, how, strings.Join(columns, " | "))
}

// add writes a measure. Numbers beside the first are followed by how many times it they
// are.
func (r *report) add(rows ...row) {
	for _, w := range rows {
		fmt.Fprintf(&r.text, "| %s |", w.what)
		for i, v := range w.values {
			switch {
			case math.IsNaN(v):
				r.text.WriteString(" |")
			case i > 0 && w.values[0] > 0:
				fmt.Fprintf(&r.text, " %s (%s) |", number(v, w.unit), times(v/w.values[0]))
			default:
				fmt.Fprintf(&r.text, " %s |", number(v, w.unit))
			}
		}
		met := ""
		if w.aim.met != nil && !math.IsNaN(w.values[2]) {
			met = map[bool]string{true: "yes", false: "no"}[w.aim.met(w.values)]
		}
		fmt.Fprintf(&r.text, " %s | %s |\n", w.aim.text, met)
	}
}

// times says how often something goes into something else.
func times(v float64) string { return fmt.Sprintf("%.2f×", v) }

// number has three digits that count, or is whole.
func number(v float64, unit string) string {
	digits := 0
	if v != math.Trunc(v) {
		digits = min(3, max(0, 2-int(math.Floor(math.Log10(math.Abs(v))))))
	}
	return strings.TrimSpace(fmt.Sprintf("%.*f %s", digits, v, unit))
}

// draw writes a chart.
func (r *report) draw(tb testing.TB, name string, c chart.Chart) {
	tb.Helper()
	check(tb, c.WriteFile(filepath.Join(r.dir, name+".svg")))
	fmt.Fprintf(&r.text, "\n![%s](%s.svg)\n\n", c.Title, name)
}

// newReport makes the directory of TATAMI_ISOLATION_OUT.
func newReport(tb testing.TB) *report {
	tb.Helper()
	r := &report{dir: cmp.Or(os.Getenv("TATAMI_ISOLATION_OUT"), tb.TempDir())}
	check(tb, os.MkdirAll(r.dir, 0o755))
	return r
}

// save writes the table.
func (r *report) save(tb testing.TB) {
	tb.Helper()
	check(tb, os.WriteFile(filepath.Join(r.dir, "results.md"), []byte("## Online and batch on one node\n"+r.text.String()), 0o644))
}

// distribution is the curve of how many of sorted values are above: x the value, y the
// share of those that are larger.
func distribution(name string, sorted []float64, colour int) chart.Line {
	l := chart.Line{Name: name, Colour: colour}
	for i, v := range sorted {
		if i%max(1, len(sorted)/400) == 0 || i > len(sorted)-50 {
			l.Points = append(l.Points, [2]float64{max(v, 0.001), float64(len(sorted)-i) / float64(len(sorted))})
		}
	}
	return l
}

// rates are the curves of what was sent over time, in MB/s, of online and of batch, from
// a moment on.
func rates(all []sample, from time.Time) (online, batch chart.Line) {
	online, batch = chart.Line{Name: "online"}, chart.Line{Name: "batch", Colour: 1}
	const step = 5 // samples: half a second is smooth enough to see
	for i := step; i < len(all); i += step {
		a, b := all[i-step], all[i]
		took := b.at.Sub(a.at).Seconds()
		at := b.at.Sub(from).Seconds()
		online.Points = append(online.Points, [2]float64{at, float64(b.online-a.online) / took / 1e6})
		batch.Points = append(batch.Points, [2]float64{at, float64(b.batch-a.batch) / took / 1e6})
	}
	return online, batch
}

// linkChart shows what the link carried.
func linkChart(title string, all []sample, from time.Time) chart.Chart {
	online, batch := rates(all, from)
	return chart.Chart{Title: title, X: "seconds", Y: "MB/s", LinearX: true, LinearY: true, Lines: []chart.Line{online, batch}}
}
