package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/tatami-containers/tatami/tools/check"
	"github.com/tatami-containers/tatami/tools/progress"
)

// exitProblems is the exit code of a check that has found something.
const exitProblems = 1

func checkCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var o imageFlags
	fs := flagSet("check", "[flags] IMAGE", s.Err)
	o.register(fs, s)
	if err := o.parse(fs, args, 1, 1); err != nil {
		return 0, err
	}
	defer o.close()
	src, sel, err := o.selected(ctx, fs.Arg(0))
	if err != nil {
		return 0, err
	}
	p, done := o.reporter()
	defer done()
	var all []*check.Report
	code := 0
	for _, img := range sel.Images {
		r, err := check.Image(ctx, src, img, p, o.log())
		if err != nil {
			return 0, closing(src, err)
		}
		all = append(all, r)
		if r.Problems > 0 {
			code = exitProblems
		}
	}
	done()
	err = o.print(all, func(w io.Writer) {
		for _, r := range all {
			printChecked(w, r)
		}
	})
	return code, closing(src, err)
}

func printChecked(w io.Writer, r *check.Report) {
	fmt.Fprintf(w, "%s %s\n", r.Platform, r.Manifest)
	for _, l := range r.Layers {
		for _, way := range l.Ways {
			printWay(w, l, way)
		}
	}
	if r.Problems == 0 {
		fmt.Fprintln(w, "  good")
	} else {
		fmt.Fprintf(w, "  %d problems\n", r.Problems)
	}
}

func printWay(w io.Writer, l check.Layer, way check.Way) {
	what := "verified"
	if way.Compared {
		what = "verified and compared"
	}
	name := "image"
	if l.Blob != "" {
		name = l.Blob.Encoded()[:12]
	}
	fmt.Fprintf(w, "  %s %-6s %d entries, %d chunks, %s %s\n", name, way.From, way.Entries, way.Chunks, progress.Bytes(way.Bytes), what)
	for _, p := range way.Problems {
		fmt.Fprintf(w, "    %s\n", p)
	}
	if way.More > 0 {
		fmt.Fprintf(w, "    and %d more\n", way.More)
	}
}
