package node

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Prepared is an image that can be read.
type Prepared struct {
	Reference reference.Named // normalised
	Manifest  digest.Digest
	// Config is the image configuration (OCI JSON).
	Config []byte
	// CompressedSize is the sum of the layer blobs, ImageSize that of the
	// one-file image; bytes.
	CompressedSize, ImageSize int64
	// Index is where the index came from: "node", "built", or one of the From
	// constants of package formats; of layers that differ, the most expensive way.
	Index   string
	Fetched int64 // from the registry, in bytes
	Phases  []Phase
}

// Phase is one step of a Prepare.
type Phase struct {
	Name            string
	Start, Duration time.Duration // since the call began
}

// Prepare resolves a reference and sees to its index. A tag is resolved at
// every call; when its registry cannot be reached, what it meant last counts,
// with a warning in the log. A digest that the node has needs no registry. Who
// prepares the same at the same time shares the work, and the work ends when
// the last of them has gone. platform is "os/architecture[/variant]"; empty is
// the node's own.
func (n *Node) Prepare(ctx context.Context, ref, platform string) (*Prepared, error) {
	return n.prepareOnly(ctx, ref, platform, "")
}

// prepareOnly is Prepare; when only is not empty and ref means another manifest,
// nothing is prepared (ErrFailedPrecondition).
func (n *Node) prepareOnly(ctx context.Context, ref, platform string, only digest.Digest) (*Prepared, error) {
	named, want, err := parseTarget(ref, platform)
	if err != nil {
		return nil, err
	}
	t := target{named.String(), platform, only}
	p, _, err := n.prepares.do(ctx, t, func(ctx context.Context, _ *atomic.Int64) (*Prepared, error) {
		return n.prepare(ctx, t, named, want)
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("prepare %s: %w", named, err)
	}
	return p, nil
}

func parseTarget(ref, platform string) (reference.Named, ocispec.Platform, error) {
	named, err := image.ParseReference(ref)
	if err != nil {
		return nil, ocispec.Platform{}, err
	}
	p, err := image.ParsePlatform(platform)
	return named, p, err
}

// clock measures the phases of a Prepare.
type clock struct {
	start, last time.Time
	phases      []Phase
}

func newClock() *clock {
	now := time.Now()
	return &clock{start: now, last: now}
}

// mark ends the phase that began at the mark before.
func (c *clock) mark(name string) {
	now := time.Now()
	c.phases = append(c.phases, Phase{name, c.last.Sub(c.start), now.Sub(c.last)})
	c.last = now
}

func (n *Node) prepare(ctx context.Context, t target, ref reference.Named, platform ocispec.Platform) (*Prepared, error) {
	defer n.startJob(t.reference)()
	c := newClock()
	repo := &counting{Repository: n.cfg.Registry.Repository(ref)}
	manifest, img, err := n.resolve(ctx, repo, t, ref, platform)
	if err != nil {
		return nil, err
	}
	if t.only != "" && manifest != t.only {
		return nil, fmt.Errorf("it means %s and not %s: %w", manifest, t.only, errdefs.ErrFailedPrecondition)
	}
	c.mark("resolve")
	done := indexed{from: fromNode}
	if img != nil {
		n.setJob(t.reference, manifest)
		finder := n.finder(repo.Repository, img)
		wanted, err := finder.Layers()
		if err != nil {
			return nil, err
		}
		done, _, err = n.indexing.do(ctx, manifest, func(ctx context.Context, _ *atomic.Int64) (indexed, error) {
			return n.index(ctx, repo.Repository, img, finder, wanted)
		}, nil)
		if err != nil {
			return nil, err
		}
		for _, p := range done.phases {
			p.Start += c.last.Sub(c.start)
			c.phases = append(c.phases, p)
		}
		if err := n.remember(t, repo.top, manifest); err != nil {
			return nil, err
		}
		n.repin()
	}
	p, err := n.prepared(ref, manifest)
	if err != nil {
		return nil, err
	}
	if fresh := done.from != fromNode; fresh || n.hasProfile(manifest, "") {
		n.startReplay(&replay{key: replayKey{manifest: manifest}, repo: repo.Repository, look: fresh, flow: flowOf(ctx)})
	}
	p.Index, p.Fetched, p.Phases = done.from, done.fetched+repo.bytes, c.phases
	n.log.Info("image prepared", "reference", t.reference, "manifest", manifest, "index", p.Index,
		"fetched", p.Fetched, "image_size", p.ImageSize, "took", time.Since(c.start))
	if done.from == fromBlob {
		// Entries and windows are garbage now, of no use until the next image.
		n.background.Go(debug.FreeOSMemory)
	}
	return p, nil
}

// flowOf is whom the work of a context is for; nil for nobody in particular.
func flowOf(ctx context.Context) *sched.Flow {
	if w := sched.From(ctx); w != nil {
		return w.Standing().Flow
	}
	return nil
}

func (n *Node) prepared(ref reference.Named, manifest digest.Digest) (*Prepared, error) {
	r, ok := n.known(manifest)
	if !ok {
		return nil, fmt.Errorf("image %s was removed meanwhile: %w", manifest, errdefs.ErrUnavailable)
	}
	config, err := n.readFile(r, configFile)
	if err != nil {
		return nil, err
	}
	return &Prepared{
		Reference: ref, Manifest: manifest, Config: config,
		CompressedSize: r.compressedSize(), ImageSize: r.ImageSize,
	}, nil
}

// resolve returns the manifest's digest. The image is nil when the node has it
// already.
func (n *Node) resolve(ctx context.Context, repo *counting, t target, ref reference.Named, platform ocispec.Platform) (digest.Digest, *image.Image, error) {
	last := n.meant(t)
	if last != nil {
		if pinned, ok := ref.(reference.Digested); ok && pinned.Digest() == last.Top {
			return last.Manifest, nil, nil
		}
		top, err := n.ask(ctx, repo, image.Object(ref))
		if errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err) {
			n.log.Warn("the registry cannot be reached; the image that the reference meant last is used",
				"reference", t.reference, "manifest", last.Manifest, "error", err)
			return last.Manifest, nil, nil
		}
		if err != nil {
			return "", nil, err
		}
		if top.Digest == last.Top {
			return last.Manifest, nil, nil
		}
	}
	img, err := image.Resolve(ctx, repo, ref, platform)
	if err != nil {
		return "", nil, err
	}
	return img.Desc.Digest, img, nil
}

// finder looks for ways to the layers of img in its repository.
func (n *Node) finder(repo *registry.Repository, img *image.Image) *formats.Finder {
	blob := func(d ocispec.Descriptor) layer.Blob { return repo.LayerBlob(d) }
	f := formats.New(repo, blob, img, n.log)
	f.CPU = n.cfg.Sched.CPU()
	return f
}

// ask resolves a tag that was resolved before. A registry that does not answer
// in time is as good as one that cannot be reached: there is another answer.
func (n *Node) ask(ctx context.Context, repo *counting, object string) (ocispec.Descriptor, error) {
	bounded, cancel := context.WithTimeout(ctx, n.patience)
	defer cancel()
	desc, err := repo.Resolve(registry.AtOnce(bounded), object) // a turn may take longer
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("registry %s does not answer within %s: %w", repo.Host(), n.patience, errdefs.ErrUnavailable)
	}
	return desc, err
}

// counting counts what resolving fetches, and notes what the registry has
// under the reference itself. It is for one goroutine.
type counting struct {
	*registry.Repository
	top   digest.Digest
	bytes int64
}

// GetManifest implements image.Registry.
func (c *counting) GetManifest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	desc, data, err := c.Repository.GetManifest(ctx, ref)
	c.top = desc.Digest
	c.bytes += int64(len(data))
	return desc, data, err
}

// Manifest implements image.Registry.
func (c *counting) Manifest(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	data, err := c.Repository.Manifest(ctx, desc)
	c.bytes += int64(len(data))
	return data, err
}

// Blob implements image.Registry.
func (c *counting) Blob(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	data, err := c.Repository.Blob(ctx, desc)
	c.bytes += int64(len(data))
	return data, err
}
