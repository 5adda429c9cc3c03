// Package bench measures starts: the same image, link and machine, first with
// a full pull inside the guest, then lazily on a node that knows nothing, then
// lazily on a node that has the image.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/tools/link"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/run"
)

// Names of the three ways to start.
const (
	FullPull = "full guest pull"
	Cold     = "lazy, cold node"
	Warm     = "lazy, warm node"
)

// StartOptions of a comparison.
type StartOptions struct {
	Run    run.Options // Mode, Root, Registry and Socket are set by the comparison
	Link   link.Shape  // put in front of the image's registry
	Rounds int         // runs of each way
	Ways   []string    // which ways; all when empty
	Out    io.Writer   // where a line for each run goes
}

// Comparison is what the runs reported, by way, in the order of the rounds.
type Comparison struct {
	Image   string                   `json:"image"`
	Link    string                   `json:"link"`
	Reports map[string][]*run.Report `json:"reports"`
}

// Start runs the comparison.
func Start(ctx context.Context, o StartOptions) (*Comparison, error) {
	dir, err := os.MkdirTemp("", "tatami-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for the comparison: %w", err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	w, err := openWire(gctx, g, o)
	if err != nil {
		return nil, err
	}
	c := &Comparison{Image: o.Run.Image, Link: fmt.Sprintf("%d bit/s, %v", 8*o.Link.Rate, o.Link.RTT), Reports: map[string][]*run.Report{}}
	err = c.rounds(ctx, o, w, dir)
	cancel()
	return c, errors.Join(err, g.Wait())
}

// wire is the registry behind the link: its TCP address for the node and the
// image's name there.
type wire struct {
	link  *link.Link
	image string
	tcp   string
}

func openWire(ctx context.Context, g *errgroup.Group, o StartOptions) (*wire, error) {
	host, rest, err := RegistryOf(o.Run.Image)
	if err != nil {
		return nil, err
	}
	w := &wire{link: link.New(host, o.Link)}
	var lc net.ListenConfig
	tcp, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the link: %w", err)
	}
	w.tcp = tcp.Addr().String()
	w.image = w.tcp + "/" + rest
	g.Go(func() error { return w.link.Serve(ctx, tcp) })
	return w, nil
}

// RegistryOf splits a reference into the registry's address and the rest. Only
// a registry named with a port can be put behind the link, which changes its
// address: a TLS certificate would not fit.
func RegistryOf(image string) (host, rest string, err error) {
	for i := range len(image) {
		if image[i] != '/' {
			continue
		}
		if _, _, err := net.SplitHostPort(image[:i]); err == nil {
			return image[:i], image[i+1:], nil
		}
		break
	}
	return "", "", fmt.Errorf("%s: the comparison needs a plain HTTP registry named HOST:PORT/REPOSITORY; copy the image to one, as `make run IMAGE=…` does: %w", image, errdefs.ErrInvalidArgument)
}

func (c *Comparison) rounds(ctx context.Context, o StartOptions, w *wire, dir string) error {
	for i := range max(1, o.Rounds) {
		root := filepath.Join(dir, fmt.Sprintf("node-%d", i))
		for _, way := range ways {
			if len(o.Ways) > 0 && !slices.Contains(o.Ways, way) {
				continue
			}
			r, err := c.one(ctx, o, w, way, root)
			if err != nil {
				return fmt.Errorf("%s: %w", way, err)
			}
			c.Reports[way] = append(c.Reports[way], r)
			fmt.Fprintf(o.Out, "%-16s first exec after %6.2f s, done after %6.2f s, %9s over the link\n", way, r.FirstExec, r.Done, progress.Bytes(r.Fetched))
		}
		if err := os.RemoveAll(root); err != nil {
			return fmt.Errorf("remove the node's directory: %w", err)
		}
	}
	return nil
}

// one starts the image in one way; the node's state is in root.
func (c *Comparison) one(ctx context.Context, o StartOptions, w *wire, way, root string) (*run.Report, error) {
	ro := o.Run
	ro.Image, ro.Root, ro.PlainHTTP = w.image, root, []string{w.tcp}
	ro.Mode, ro.Registry = run.Lazy, w.link.Serve
	if way == FullPull {
		ro.Mode, ro.Source = run.Full, ""
		// Guest pull unpacks into the guest's memory.
		ro.MemoryMiB = max(ro.MemoryMiB, fullPullMemory)
	}
	before := w.link.Bytes()
	r, err := run.Run(ctx, ro)
	if err != nil {
		return nil, err
	}
	if r.ExitCode != 0 {
		return nil, fmt.Errorf("the container ended with exit code %d", r.ExitCode)
	}
	r.Fetched = w.link.Bytes() - before // counted where every way passes
	return r, nil
}

// fullPullMemory is what the guest of a full pull gets in MiB: room for the
// unpacked image, half of it being the limit of a tmpfs.
const fullPullMemory = 4096
