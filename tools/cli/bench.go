package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/bench"
	"github.com/tatami-containers/tatami/tools/link"
)

func benchCommand(ctx context.Context, args []string, s Streams) (int, error) {
	if len(args) == 0 || args[0] != "start" {
		return 0, fmt.Errorf("want `tatami bench start`: %w", errdefs.ErrInvalidArgument)
	}
	var o bench.StartOptions
	var shape, format string
	const argsHelp = "start [flags] IMAGE [-- CMD ARG…]"
	fs := flagSet("bench", argsHelp, s.Err)
	runFlags(fs, &o.Run)
	fs.StringVar(&shape, "link", "1gbit,5ms", "the link to the registry: rate and round-trip time")
	fs.IntVar(&o.Rounds, "rounds", 1, "runs of each way; the medians are compared")
	fs.StringVar(&format, "format", "text", "text or json")
	if err := parse(fs, args[1:]); err != nil {
		return 0, err
	}
	if fs.NArg() == 0 || (format != "text" && format != "json") {
		return 0, fmt.Errorf("usage: tatami bench %s, --format text or json: %w", argsHelp, errdefs.ErrInvalidArgument)
	}
	var err error
	if o.Link, err = link.ParseShape(shape); err != nil {
		return 0, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	o.Run.Image, o.Run.Args = fs.Arg(0), commandLine(fs.Args()[1:])
	o.Run.Stdin, o.Run.Stdout, o.Run.Stderr = noInput{}, s.Err, s.Err
	o.Run.Progress, o.Out = s.Err, s.Err
	stop := catchSignals(&o.Run)
	defer stop()
	c, err := bench.Start(ctx, o)
	if err != nil {
		return 0, err
	}
	if format == "json" {
		return 0, c.WriteJSON(s.Out)
	}
	return 0, c.WriteText(s.Out)
}

// noInput is an empty standard input for containers that are started several
// times.
type noInput struct{}

func (noInput) Read([]byte) (int, error) { return 0, io.EOF }
