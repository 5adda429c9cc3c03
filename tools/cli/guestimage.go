package cli

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/guestimage"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/run"
	"github.com/tatami-containers/tatami/tools/vm"
)

const guestImageUsage = "build [flags] FILE"

func guestImageCommand(ctx context.Context, args []string, s Streams) (int, error) {
	if len(args) == 0 || args[0] != "build" {
		return 0, fmt.Errorf("usage: tatami guest-image %s: %w", guestImageUsage, errdefs.ErrInvalidArgument)
	}
	var o guestImageFlags
	fs := flagSet("guest-image", guestImageUsage, s.Err)
	o.register(fs)
	if err := parse(fs, args[1:]); err != nil {
		return 0, err
	}
	if fs.NArg() != 1 {
		return 0, fmt.Errorf("arguments %q: name one file, after the flags; usage: tatami guest-image %s: %w", fs.Args(), guestImageUsage, errdefs.ErrInvalidArgument)
	}
	if o.format != "text" && o.format != "json" {
		return 0, fmt.Errorf("-o %q: want text or json: %w", o.format, errdefs.ErrInvalidArgument)
	}
	if err := o.find(); err != nil {
		return 0, err
	}
	if err := o.checkConfig(ctx); err != nil {
		return 0, err
	}
	r, err := guestimage.Build(fs.Arg(0), o.Options)
	if err != nil {
		return 0, err
	}
	return 0, printGuestImage(s.Out, o.format, r)
}

// guestImageFlags are the options of guestimage as they are written.
type guestImageFlags struct {
	guestimage.Options
	kernel, format string
}

func (o *guestImageFlags) register(fs *flag.FlagSet) {
	fs.StringVar((*string)(&o.Kind), "kind", string(guestimage.Extension), "what to make: extension, tarball or initramfs")
	fs.StringVar(&o.Arch, "arch", runtime.GOARCH, "architecture of the guest: amd64 or arm64")
	fs.StringVar(&o.Guest, "guest", "", "static tatami-guest (default: beside this program, then in PATH)")
	fs.StringVar(&o.Pause, "pause", "", "static process of sandboxes' own containers (default: beside this program, then in PATH)")
	fs.StringVar(&o.Config, "config", "", "guest.toml to include")
	fs.StringVar(&o.CDH, "with-cdh", "", "extension: a real Confidential Data Hub to start on a socket of its own, for all but images")
	fs.BoolVar(&o.Verity, "verity", false, "extension: partitions with a dm-verity hash tree")
	fs.Func("salt", "extension: salt of the hash tree in `HEX` (default: made from the content)", o.setSalt)
	fs.StringVar(&o.kernel, "kernel", "", "initramfs: kernel whose modules to include (default: as for `tatami run`)")
	fs.StringVar(&o.Runtime, "runtime", "", "initramfs: OCI runtime (default: crun, then runc in PATH)")
	fs.StringVar(&o.format, "o", "text", "output: text or json")
}

func (o *guestImageFlags) setSalt(s string) (err error) {
	o.Salt, err = hex.DecodeString(s)
	return err
}

// find fills in the programs that were not named.
func (o *guestImageFlags) find() (err error) {
	programs := []struct {
		path *string
		find func() (string, error)
		of   bool
	}{
		{&o.Guest, func() (string, error) { return run.FindProgram("tatami-guest") }, true},
		{&o.Pause, func() (string, error) { return run.FindProgram("pause") }, o.Kind != guestimage.Initramfs},
		{&o.Runtime, run.FindRuntime, o.Kind == guestimage.Initramfs},
	}
	for _, p := range programs {
		if !p.of || *p.path != "" {
			continue
		}
		if *p.path, err = p.find(); err != nil {
			return err
		}
	}
	if o.Kind == guestimage.Initramfs {
		k, err := vm.FindKernel(o.kernel)
		o.Modules = k.Modules
		return err
	}
	return nil
}

// checkConfig lets tatami-guest read its configuration, where it can run: a
// guest would not start with one that it refuses.
func (o *guestImageFlags) checkConfig(ctx context.Context) error {
	if o.Config == "" || o.Arch != runtime.GOARCH {
		return nil
	}
	out, err := exec.CommandContext(ctx, o.Guest, "--config", o.Config, "check").CombinedOutput()
	if err != nil {
		return fmt.Errorf("--config: %s refuses it: %w: %s: %w", o.Guest, err, bytes.TrimSpace(out), errdefs.ErrInvalidArgument)
	}
	return nil
}

func printGuestImage(w io.Writer, format string, r *guestimage.Result) error {
	if format == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	fmt.Fprintf(w, "%s\n  %s for %s, %s\n  %s\n", r.File, r.Kind, r.Arch, progress.Bytes(r.Size), r.Digest)
	if r.Kind == guestimage.Extension {
		fmt.Fprintf(w, "  verity_params = %q\n", r.VerityParams)
	}
	if len(r.Requires) > 0 {
		fmt.Fprintf(w, "  the guest must have %s\n", strings.Join(r.Requires, ", "))
	}
	return nil
}
