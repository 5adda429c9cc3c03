package cli

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

// imageNames is what the commands about images say of their arguments.
const imageNames = `An image is a reference (of a registry), oci:DIR[:TAG], oci-archive:FILE[:TAG]
or docker-archive:FILE[:REF].`

// imageFlags are those of the commands that read and write images.
type imageFlags struct {
	platform  string
	plainHTTP list
	output    string
	quiet     bool

	streams Streams
	client  *registry.Client
}

func (o *imageFlags) register(fs *flag.FlagSet, s Streams) {
	o.streams = s
	fs.StringVar(&o.platform, "platform", "", "only the image for this platform, as linux/amd64 (default: all of an index)")
	fs.Var(&o.plainHTTP, "plain-http", "registry `HOST:PORT` to ask without TLS; may be repeated (loopback needs none)")
	fs.StringVar(&o.output, "o", "text", "output: text or json")
	fs.BoolVar(&o.quiet, "quiet", false, "no progress")
	usage := fs.Usage
	fs.Usage = func() {
		usage()
		fmt.Fprintf(s.Err, "\n%s\n", imageNames)
	}
}

// parse reads the arguments, of which there must be min to max.
func (o *imageFlags) parse(fs *flag.FlagSet, args []string, min, max int) error {
	if err := parse(fs, args); err != nil {
		return err
	}
	if n := fs.NArg(); n < min || n > max {
		return fmt.Errorf("%d images named; see `%s -h`: %w", n, fs.Name(), errdefs.ErrInvalidArgument)
	}
	if o.output != "text" && o.output != "json" {
		return fmt.Errorf("-o %q: want text or json: %w", o.output, errdefs.ErrInvalidArgument)
	}
	o.client = transport.NewClient(o.plainHTTP)
	return nil
}

func (o *imageFlags) close() { _ = o.client.Close() } // never fails

// wanted is the platform that was asked for; nil means all.
func (o *imageFlags) wanted() (*ocispec.Platform, error) {
	if o.platform == "" {
		return nil, nil
	}
	p, err := image.ParsePlatform(o.platform)
	return &p, err
}

func (o *imageFlags) source(name string) (transport.Source, error) {
	n, err := transport.Parse(name)
	if err != nil {
		return nil, err
	}
	return transport.OpenSource(n, transport.Options{Registry: o.client})
}

func (o *imageFlags) dest(name string) (transport.Dest, error) {
	n, err := transport.Parse(name)
	if err != nil {
		return nil, err
	}
	return transport.OpenDest(n, transport.Options{Registry: o.client})
}

// hasTag says whether a destination's name has a tag, which something new can
// get; a digest is that of something else.
func hasTag(dst transport.Dest) bool {
	_, err := digest.Parse(dst.Tag())
	return dst.Tag() != "" && err != nil
}

// selected opens a source and reads the images that its name means.
func (o *imageFlags) selected(ctx context.Context, name string) (transport.Source, *transport.Selection, error) {
	platform, err := o.wanted()
	if err != nil {
		return nil, nil, err
	}
	src, err := o.source(name)
	if err != nil {
		return nil, nil, err
	}
	sel, err := transport.Select(ctx, src, name, platform)
	if err != nil {
		return nil, nil, closing(src, err)
	}
	return src, sel, nil
}

// reporter shows how far long work is. done ends it.
func (o *imageFlags) reporter() (p progress.Reporter, done func()) {
	if o.quiet {
		return progress.None, func() {}
	}
	d := progress.New(o.streams.Err)
	return d, sync.OnceFunc(d.Close)
}

// log is for what is passed over.
func (o *imageFlags) log() *slog.Logger {
	return slog.New(slog.NewTextHandler(o.streams.Err, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// print writes v as JSON, or lets text write it.
func (o *imageFlags) print(v any, text func(io.Writer)) error {
	if o.output == "text" {
		text(o.streams.Out)
		return nil
	}
	e := json.NewEncoder(o.streams.Out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// closing closes c after an error, or with its own.
func closing(c io.Closer, err error) error {
	if closeErr := c.Close(); err == nil {
		err = closeErr
	}
	return err
}
