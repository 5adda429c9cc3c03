package cli

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/bench"
	"github.com/tatami-containers/tatami/tools/link"
	"github.com/tatami-containers/tatami/tools/run"
)

// runFlags are what run and bench have in common.
func runFlags(fs *flag.FlagSet, o *run.Options) {
	fs.StringVar(&o.VM, "vm", run.QEMU, "where to run: qemu (a virtual machine) or none (processes on this machine)")
	nodeFlags(fs, o)
	fs.StringVar(&o.Kernel, "kernel", "", "guest kernel (default: one that is found, see README)")
	fs.IntVar(&o.MemoryMiB, "memory", 512, "memory of the virtual machine in `MiB`")
	fs.StringVar(&o.Source, "source", run.SourceAuto, "where a lazy image comes from: virtiofs (the node's own file, by tatami-virtiofsd), relay (the node, over vsock),\n"+
		"registry (the guest asks it), auto: virtiofs where tatami-virtiofsd is installed, else relay")
	fs.StringVar(&o.ImagesSocket, "images-socket", "", "where tatami-host gives images to tatami-virtiofsd (default: images.sock in --root)")
	fs.IntVar(&o.CPUs, "cpus", 1, "processors of the virtual machine")
	fs.StringVar(&o.Accel, "accel", "auto", "auto, kvm or tcg; auto takes KVM only after a guest really booted on it")
}

// nodeFlags are those of every command that uses the node's daemon.
func nodeFlags(fs *flag.FlagSet, o *run.Options) {
	fs.StringVar(&o.Root, "root", "/var/lib/tatami", "what the node keeps")
	fs.StringVar(&o.Platform, "platform", "", "platform of the image, as linux/amd64 (default this machine's)")
	fs.Var((*list)(&o.PlainHTTP), "plain-http", "registry `HOST:PORT` to ask without TLS; may be repeated (loopback needs none)")
	fs.StringVar(&o.Socket, "host-socket", "", "control socket of a running tatami-host (default: the one of --root, started when needed)")
	fs.StringVar(&o.MountPath, "mount-path", "auto", "how the guest mounts the image: auto, file or loop")
}

func runCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var o run.Options
	var format, reportFile string
	var quiet bool
	const argsHelp = "[flags] IMAGE [-- CMD ARG…]"
	fs := flagSet("run", argsHelp, s.Err)
	runFlags(fs, &o)
	fs.StringVar(&o.Mode, "mode", run.Lazy, "lazy, or full: download and unpack before the start")
	fs.StringVar(&o.Class, "class", "", "`class` of the node's settings: online, batch (default: what they say)")
	fs.StringVar(&o.Upper, "upper", "", "directory in the guest for what the container writes (default: a tmpfs)")
	fs.StringVar(&format, "format", "text", "of the report: text or json")
	fs.StringVar(&reportFile, "report", "", "write the report to this `FILE` (default: standard error)")
	fs.BoolVar(&quiet, "quiet", false, "neither progress nor report")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	if fs.NArg() == 0 {
		return 0, fmt.Errorf("no image named; usage: tatami run %s: %w", argsHelp, errdefs.ErrInvalidArgument)
	}
	if format != "text" && format != "json" {
		return 0, fmt.Errorf("--format %q: want text or json: %w", format, errdefs.ErrInvalidArgument)
	}
	o.Image, o.Args = fs.Arg(0), commandLine(fs.Args()[1:])
	if o.Mode == run.Full || o.Source == run.SourceRegistry {
		host, _, err := bench.RegistryOf(o.Image)
		if err != nil {
			return 0, err
		}
		o.Registry, o.PlainHTTP = link.New(host, link.Shape{}).Serve, append(o.PlainHTTP, host)
	}
	o.Stdin, o.Stdout, o.Stderr = s.In, s.Out, s.Err
	if !quiet {
		o.Progress = s.Err
	}
	stop := catchSignals(&o)
	defer stop()
	r, err := run.Run(ctx, o)
	if err != nil {
		return 0, err
	}
	if quiet && reportFile == "" {
		return r.ExitCode, nil
	}
	return r.ExitCode, writeReport(r, format, reportFile, s.Err)
}

// commandLine drops the "--" between the image and its command.
func commandLine(args []string) []string {
	if len(args) > 0 && args[0] == "--" {
		return args[1:]
	}
	return args
}

// catchSignals lets the run have what the user sends.
func catchSignals(o *run.Options) (stop func()) {
	c := make(chan os.Signal, 8)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	o.Signals = c
	// A reader of our output that goes away is no reason to die without undoing.
	pipe := make(chan os.Signal, 1)
	signal.Notify(pipe, syscall.SIGPIPE)
	return func() { signal.Stop(c); signal.Stop(pipe) }
}

func writeReport(r *run.Report, format, file string, w io.Writer) error {
	if file != "" {
		f, err := os.Create(file)
		if err != nil {
			return fmt.Errorf("write the report: %w", err)
		}
		defer f.Close()
		w = f
	}
	if format == "json" {
		return r.WriteJSON(w)
	}
	return r.WriteText(w)
}
