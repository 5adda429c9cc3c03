package run

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"

	"github.com/containerd/errdefs"
)

// Where a container runs.
const (
	QEMU = "qemu" // in a virtual machine
	None = "none" // on this machine, guest and host joined by unix sockets
)

// How the image comes to the guest.
const (
	Lazy = "lazy" // mounted at once, bytes follow
	Full = "full" // downloaded and unpacked first, as guest pull does
)

// Where the bytes of a lazy image come from.
const (
	SourceAuto     = "auto"     // virtio-fs where that is possible, else the relay
	SourceVirtioFS = "virtiofs" // the node's own image file, by a tatami-virtiofsd
	SourceRelay    = "relay"    // the node's relay
	SourceRegistry = "registry" // the guest asks registries itself
)

// Options of one run. Image is required; the zero value of the others is
// sensible after withDefaults.
type Options struct {
	Image string
	Args  []string // the command line; the image's own when empty

	VM       string // QEMU or None
	Mode     string // Lazy or Full
	Source   string // SourceAuto and so on; for Mode Lazy
	Platform string // "linux/amd64"; the machine's own when empty
	Class    string // one of the node's; its default when empty

	Root   string // state of the node's daemon
	Socket string // control socket of a tatami-host that runs already
	// ImagesSocket is where that daemon gives images to tatami-virtiofsd;
	// images.sock in Root when empty.
	ImagesSocket string
	PlainHTTP    []string // registries to ask without TLS, "host:port"
	// Registry answers a guest that asks registries by itself, until ctx ends. It
	// is needed when Mode is Full or Source is SourceRegistry.
	Registry func(ctx context.Context, l net.Listener) error

	Kernel    string // vmlinuz; found when empty
	MemoryMiB int
	CPUs      int
	Accel     string // "auto", "kvm" or "tcg"
	MountPath string // "auto", "file" or "loop"
	Upper     string // directory for the writable layer; a tmpfs when empty
	Target    string // where to mount on this machine; only read when VM is None
	Keep      string // where the guest keeps what it fetched; nowhere when empty
	Fill      bool   // fetch the rest of the image in the background

	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Signals        <-chan os.Signal // forwarded to the container
	Progress       io.Writer        // where to draw progress; nowhere when nil
	Log            *slog.Logger
}

func (o *Options) withDefaults() Options {
	d := *o
	setDefault(&d.VM, QEMU)
	setDefault(&d.Mode, Lazy)
	setDefault(&d.Source, SourceAuto)
	setDefault(&d.Root, "/var/lib/tatami")
	setDefault(&d.Accel, "auto")
	setDefault(&d.MountPath, "auto")
	if d.MemoryMiB == 0 {
		d.MemoryMiB = 512
	}
	if d.CPUs == 0 {
		d.CPUs = 1
	}
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	return d
}

func setDefault(s *string, v string) {
	if *s == "" {
		*s = v
	}
}

func (o *Options) validate() error {
	for _, c := range []struct {
		name, value string
		allowed     []string
	}{
		{"--vm", o.VM, []string{QEMU, None}},
		{"--mode", o.Mode, []string{Lazy, Full}},
		{"--source", o.Source, []string{SourceAuto, SourceVirtioFS, SourceRelay, SourceRegistry}},
		{"--accel", o.Accel, []string{"auto", "kvm", "tcg"}},
		{"--mount-path", o.MountPath, []string{"auto", "file", "loop"}},
	} {
		if !slices.Contains(c.allowed, c.value) {
			return fmt.Errorf("%s %q: want one of %q: %w", c.name, c.value, c.allowed, errdefs.ErrInvalidArgument)
		}
	}
	if o.Image == "" {
		return fmt.Errorf("no image named: %w", errdefs.ErrInvalidArgument)
	}
	if err := o.validateSource(); err != nil {
		return err
	}
	if o.MemoryMiB < 96 || o.CPUs < 1 {
		return fmt.Errorf("a guest of %d MiB and %d CPUs does not boot; give it at least 96 MiB and 1 CPU: %w", o.MemoryMiB, o.CPUs, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (o *Options) validateSource() error {
	switch {
	case o.Source == SourceVirtioFS && o.VM == None:
		return fmt.Errorf("--source %s: without a virtual machine there is no virtio-fs: %w", o.Source, errdefs.ErrInvalidArgument)
	case o.Mode == Full && o.Source != SourceAuto && o.Source != SourceRegistry:
		return fmt.Errorf("--source %s: a full pull comes from the registry: %w", o.Source, errdefs.ErrInvalidArgument)
	case o.pulls() && o.Registry == nil:
		return fmt.Errorf("a guest that pulls by itself needs a registry: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// pulls says whether the guest asks registries itself.
func (o *Options) pulls() bool { return o.Mode == Full || o.Source == SourceRegistry }
