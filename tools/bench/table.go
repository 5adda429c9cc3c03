package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/run"
)

// ways in the order of the columns.
var ways = []string{FullPull, Cold, Warm}

// WriteText writes the timelines side by side (of the median run of each way,
// by first exec) and the ratios of the medians.
func (c *Comparison) WriteText(w io.Writer) error {
	median := map[string]*run.Report{}
	for _, way := range ways {
		median[way] = medianRun(c.Reports[way])
		if median[way] == nil {
			return fmt.Errorf("no run of %q to compare: ask for JSON: %w", way, errdefs.ErrInvalidArgument)
		}
	}
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(tw, "\t%s\n", strings.Join(ways, "\t"))
	for _, name := range phaseNames(median) {
		fmt.Fprintf(tw, "%s\t%s\n", name, row(median, func(r *run.Report) string { return phase(r, name) }))
	}
	fmt.Fprintf(tw, "mounted at\t%s\n", row(median, func(r *run.Report) string { return fmt.Sprintf("%.2f s", r.Mounted) }))
	fmt.Fprintf(tw, "first exec at\t%s\n", row(median, func(r *run.Report) string { return fmt.Sprintf("%.2f s", r.FirstExec) }))
	fmt.Fprintf(tw, "done at\t%s\n", row(median, func(r *run.Report) string { return fmt.Sprintf("%.2f s", r.Done) }))
	fmt.Fprintf(tw, "over the link\t%s\n", row(median, func(r *run.Report) string { return progress.Bytes(r.Fetched) }))
	full := median[FullPull]
	fmt.Fprintf(tw, "first exec, faster\t%s\n", row(median, func(r *run.Report) string { return fmt.Sprintf("%.1f×", full.FirstExec/r.FirstExec) }))
	fmt.Fprintf(tw, "done, faster\t%s\n", row(median, func(r *run.Report) string { return fmt.Sprintf("%.1f×", full.Done/r.Done) }))
	return tw.Flush()
}

// WriteJSON writes all reports.
func (c *Comparison) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(c)
}

func medianRun(rs []*run.Report) *run.Report {
	s := slices.SortedFunc(slices.Values(rs), func(a, b *run.Report) int {
		switch {
		case a.FirstExec < b.FirstExec:
			return -1
		case a.FirstExec > b.FirstExec:
			return 1
		}
		return 0
	})
	if len(s) == 0 {
		return nil
	}
	return s[len(s)/2]
}

// phaseNames lists the steps of all ways in the order in which they first
// appear.
func phaseNames(rs map[string]*run.Report) []string {
	var names []string
	for _, way := range ways {
		for _, p := range rs[way].Phases {
			if !slices.Contains(names, p.Name) {
				names = append(names, p.Name)
			}
		}
	}
	return names
}

func row(rs map[string]*run.Report, f func(*run.Report) string) string {
	var cells []string
	for _, way := range ways {
		cells = append(cells, f(rs[way]))
	}
	return strings.Join(cells, "\t")
}

func phase(r *run.Report, name string) string {
	for _, p := range r.Phases {
		if p.Name == name {
			return fmt.Sprintf("%6.2f s at %6.2f s", p.Took, p.Start)
		}
	}
	return "-"
}
