package cli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/bench"
	"github.com/tatami-containers/tatami/tools/link"
)

func benchCommand(ctx context.Context, args []string, s Streams) (int, error) {
	if len(args) == 0 || args[0] != "start" {
		return 0, fmt.Errorf("want `tatami bench start`: %w", errdefs.ErrInvalidArgument)
	}
	var o bench.StartOptions
	var shape, format, ways string
	const argsHelp = "start [flags] IMAGE [-- CMD ARG…]"
	fs := flagSet("bench", argsHelp, s.Err)
	runFlags(fs, &o.Run)
	fs.StringVar(&shape, "link", "1gbit,5ms", "the link to the registry: rate and round-trip time")
	fs.IntVar(&o.Rounds, "rounds", 1, "runs of each way; the medians are compared")
	fs.StringVar(&format, "format", "text", "text or json")
	fs.StringVar(&ways, "ways", "full,cold,warm", "which ways to start, with --format json: full, cold and warm; warm needs cold before it")
	if err := parse(fs, args[1:]); err != nil {
		return 0, err
	}
	if fs.NArg() == 0 || (format != "text" && format != "json") {
		return 0, fmt.Errorf("usage: tatami bench %s, --format text or json: %w", argsHelp, errdefs.ErrInvalidArgument)
	}
	var err error
	if o.Ways, err = parseWays(ways); err != nil {
		return 0, err
	}
	if len(o.Ways) < 3 && format != "json" {
		return 0, fmt.Errorf("--ways %s: only all three can be compared; use --format json: %w", ways, errdefs.ErrInvalidArgument)
	}
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

func parseWays(list string) (ways []string, err error) {
	names := map[string]string{"full": bench.FullPull, "cold": bench.Cold, "warm": bench.Warm}
	for word := range strings.SplitSeq(list, ",") {
		way, ok := names[word]
		if !ok {
			return nil, fmt.Errorf("--ways %q: want full, cold and warm: %w", list, errdefs.ErrInvalidArgument)
		}
		ways = append(ways, way)
	}
	return ways, nil
}

// noInput is an empty standard input for containers that are started several
// times.
type noInput struct{}

func (noInput) Read([]byte) (int, error) { return 0, io.EOF }
