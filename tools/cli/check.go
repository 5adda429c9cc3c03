package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/check"
	"github.com/tatami-containers/tatami/tools/progress"
)

// exitProblems is the exit code of a check that has found something.
const exitProblems = 1

// checkNode is the argument that means this machine. An image of that name is
// given by --image.
const checkNode = "node"

func checkCommand(ctx context.Context, args []string, s Streams) (int, error) {
	if len(args) > 0 && args[0] == checkNode {
		return checkNodeCommand(ctx, args[1:], s)
	}
	var o imageFlags
	var name string
	fs := flagSet("check", "[flags] IMAGE, or: tatami check node [flags]", s.Err)
	o.register(fs, s)
	fs.StringVar(&name, "image", "", "the `IMAGE`, where it is called node: that word alone means this machine")
	if err := o.parse(fs, args, 0, 1); err != nil {
		return 0, err
	}
	defer o.close()
	name, err := imageToCheck(name, fs.Args())
	if err != nil {
		return 0, err
	}
	src, sel, err := o.selected(ctx, name)
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

// imageToCheck is the image that the flag or the argument names.
func imageToCheck(flag string, args []string) (string, error) {
	switch {
	case (flag == "") == (len(args) == 0):
		return "", fmt.Errorf("name one image, as an argument or by --image: %w", errdefs.ErrInvalidArgument)
	case flag != "":
		return flag, nil
	case args[0] == checkNode:
		return "", fmt.Errorf("write `tatami check node [flags]` for this machine, or --image node for the image: %w", errdefs.ErrInvalidArgument)
	}
	return args[0], nil
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
