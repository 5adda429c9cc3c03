// Package cli is the command line of tatami: it turns arguments into the
// options of other packages and errors into messages and exit codes.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime/debug"
	"strings"

	"github.com/containerd/errdefs"
)

// exitFailed is the exit code of tatami's own failures, as other container
// tools have it; `run` otherwise returns the container's.
const exitFailed = 125

// Streams are the standard streams of the program.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// command is one word after tatami.
type command struct {
	name, args, help string
	run              func(ctx context.Context, args []string, s Streams) (int, error)
}

func commands() []command {
	return []command{
		{"run", "[flags] IMAGE [-- CMD ARG…]", "start a container from an image that is not here yet", runCommand},
		{"mount", "[flags] IMAGE DIR", "mount an image on this machine until interrupted", mountCommand},
		{"inspect", "[flags] IMAGE", "show how an image can be read lazily: indexes, chunks, sizes, what is in it twice", inspectCommand},
		{"index", "[flags] IMAGE [DST]", "make the index of an image once and publish it with the image", indexCommand},
		{"check", "[flags] IMAGE", "read all of an image in every way and compare it with an independent unpack", checkCommand},
		{"check", "node [flags]", "say what containerd and Kata on this machine lack for Tatami, and the lines to add", checkCommand},
		{"convert", "[flags] --to FORMAT SRC DST", "repack layers so that they can be read lazily", convertCommand},
		{"guest-image", guestImageUsage, "make what a Kata guest runs tatami-guest from: an extension image, or files for an image of one's own", guestImageCommand},
		{"status", "[flags]", "show what tatami-host on this machine serves, to whom, in which mode and why", statusCommand},
		{"pin", "[flags] REF…", "keep the bytes of images on this machine, whatever else needs the disk", pinCommand},
		{"unpin", "[flags] REF…", "let them make way again", unpinCommand},
		{"profile", profileUsage, "what starts of images read first: list, export, import, publish", profileCommand},
		{"bench", "start [flags] IMAGE [-- CMD ARG…]", "compare a full pull with lazy starts, side by side", benchCommand},
		{"version", "", "print the version", versionCommand},
	}
}

// Main runs the command that args name and returns the exit code.
func Main(ctx context.Context, args []string, s Streams) int {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		usage(s.Out)
		return 0
	}
	for _, c := range commands() {
		if c.name == args[0] {
			code, err := c.run(ctx, args[1:], s)
			return report(c, code, err, s.Err)
		}
	}
	fmt.Fprintf(s.Err, "tatami: unknown command %q; `tatami help` lists them\n", args[0])
	return exitFailed
}

func report(c command, code int, err error, w io.Writer) int {
	switch {
	case err == nil:
		return code
	case errors.Is(err, flag.ErrHelp):
		return 0
	}
	fmt.Fprintf(w, "tatami %s: %v\n", c.name, err)
	return exitFailed
}

func usage(w io.Writer) {
	fmt.Fprintln(w, "tatami runs containers in virtual machines from images that are not there yet.\n\nusage:")
	for _, c := range commands() {
		fmt.Fprintf(w, "  tatami %s %s\n        %s\n", c.name, c.args, c.help)
	}
	fmt.Fprintln(w, "\n`tatami COMMAND -h` lists the flags of a command.")
}

// flagSet makes the flags of one command; its usage goes to w.
func flagSet(name, args string, w io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("tatami "+name, flag.ContinueOnError)
	fs.SetOutput(w)
	fs.Usage = func() {
		fmt.Fprintf(w, "usage: tatami %s %s\n\n", name, args)
		fs.PrintDefaults()
	}
	return fs
}

// parse wraps the flag package's errors in their class.
func parse(fs *flag.FlagSet, args []string) error {
	err := fs.Parse(args)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(s string) error {
	*l = append(*l, strings.Split(s, ",")...)
	return nil
}

func versionCommand(_ context.Context, _ []string, s Streams) (int, error) {
	fmt.Fprintln(s.Out, "tatami", version())
	return 0, nil
}

func version() string {
	b, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, kv := range b.Settings {
		if kv.Key == "vcs.revision" {
			return b.Main.Version + " " + kv.Value
		}
	}
	return b.Main.Version
}
