package cli

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/tatami-containers/tatami/tools/inspect"
	"github.com/tatami-containers/tatami/tools/progress"
)

func inspectCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var o imageFlags
	var opts inspect.Options
	fs := flagSet("inspect", "[flags] IMAGE", s.Err)
	o.register(fs, s)
	fs.BoolVar(&opts.Build, "build", false, "read layers whole that have no index, to tell their chunks, too")
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
	opts.Progress, opts.Log = p, o.log()
	var all []*inspect.Report
	for _, img := range sel.Images {
		r, err := inspect.Image(ctx, src, img, opts)
		if err != nil {
			return 0, closing(src, err)
		}
		all = append(all, r)
	}
	done()
	err = o.print(all, func(w io.Writer) {
		for _, r := range all {
			printInspected(w, r)
		}
	})
	return 0, closing(src, err)
}

func printInspected(w io.Writer, r *inspect.Report) {
	fmt.Fprintf(w, "%s %s %s\n", r.Platform, r.Manifest, r.MediaType)
	if r.Parent != "" {
		fmt.Fprintf(w, "  of image index %s\n", r.Parent)
	}
	for _, a := range r.Artifacts {
		fmt.Fprintf(w, "  index artifact %s, %s, %s\n", a.Digest, binding(a.Bound), progress.Bytes(a.Size))
	}
	t := tabwriter.NewWriter(w, 2, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "  layer\tcompressed\tindex\tfetched\tread as\tsums\tentries\tchunks\tplain\tlargest\tprefetch\t\n")
	sizes := map[string]int64{}
	for _, b := range r.Blobs {
		sizes[b.Digest.String()] = b.Size
	}
	for _, l := range r.Layers {
		printLayer(t, l, sizes[l.Blob.String()])
	}
	_ = t.Flush() // like every write to a person
	if len(r.Layers) < len(r.Blobs) {
		fmt.Fprintf(w, "  %d blobs are read as %d layer\n", len(r.Blobs), len(r.Layers))
	}
	fmt.Fprintf(w, "  %s compressed; %d chunks, %s plain", progress.Bytes(r.Compressed), r.Chunks, progress.Bytes(r.Plain))
	if r.Plain > 0 {
		fmt.Fprintf(w, ", %.1f %% of it more than once", 100*float64(r.Plain-r.Unique)/float64(r.Plain))
	}
	fmt.Fprintln(w)
}

func binding(bound bool) string {
	if bound {
		return "bound"
	}
	return "referrer"
}

func printLayer(w io.Writer, l inspect.Layer, size int64) {
	if l.Index == nil {
		why := "none: a node reads the layer whole once"
		if l.Error != "" {
			why = l.Error
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\t\t\t\t\t\t\t\t\t\n", l.Blob.Encoded()[:12], progress.Bytes(size), why)
		return
	}
	from := l.From
	for _, way := range l.Ways {
		if way.From == l.From {
			from += ", " + binding(way.Bound)
			break
		}
	}
	i := l.Index
	fmt.Fprintf(w, "  %s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\t\n", l.Blob.Encoded()[:12], progress.Bytes(size), from,
		progress.Bytes(i.Fetched), i.Format, i.Sums, i.Entries, i.Chunks, progress.Bytes(i.Plain), progress.Bytes(i.Largest), progress.Bytes(i.Prefetch))
}
