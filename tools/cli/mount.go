package cli

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/run"
)

func mountCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var o run.Options
	fs := flagSet("mount", "[flags] IMAGE DIR", s.Err)
	nodeFlags(fs, &o)
	fs.StringVar(&o.Keep, "keep", "", "directory where fetched bytes are kept (default: nowhere)")
	fs.BoolVar(&o.Fill, "fill", false, "fetch the rest of the image in the background")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	if fs.NArg() != 2 {
		return 0, fmt.Errorf("usage: tatami mount [flags] IMAGE DIR: %w", errdefs.ErrInvalidArgument)
	}
	o.Image, o.Progress = fs.Arg(0), s.Err
	stop := catchSignals(&o)
	defer stop()
	return 0, run.Mount(ctx, o, fs.Arg(1), func(r *run.Report) {
		fmt.Fprintf(s.Out, "%s is mounted at %s (%s); interrupt to unmount\n", r.Image, fs.Arg(1), r.MountPath)
	})
}
