package images

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/guest/timing"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// Trust is what an index must at least be bound by.
type Trust string

// Degrees of trust, the least strict first. This guest checks no signatures: an
// image that asks for TrustSigned is refused.
const (
	TrustHost   Trust = "host"
	TrustImage  Trust = "image"
	TrustSigned Trust = "signed"
)

// relayHost stands for the node's relay where an HTTP request needs a host.
const relayHost = "relay.tatami.internal"

// describeTimeout bounds a question that takes the node under a millisecond, or,
// where no snapshotter has prepared the image before, as long as preparing does.
const describeTimeout = 2 * time.Minute

// Describer is the node's Host service.
type Describer interface {
	Describe(ctx context.Context, req *api.DescribeRequest) (*api.DescribeResponse, error)
}

// Config says whom to ask. A nil Host, Relay or Registry is not asked.
type Config struct {
	Host     Describer
	Relay    *registry.Client // dials the relay, whatever the host
	Registry *registry.Client
	// PreferRegistry takes whole layers from the registry although there is a
	// relay.
	PreferRegistry bool
	Trust          Trust  // the guest's own demand; "" is TrustHost
	LayersDir      string // where indexes of layers are kept for the next process
	// Shared lists directories in which the node may show its image files.
	Shared []string
	Log    *slog.Logger
}

// Resolver turns containers and references into images. Its methods may be
// called at the same time.
type Resolver struct {
	cfg    Config
	layers layerCache
	shared *shared
}

// New makes a resolver.
func New(cfg Config) *Resolver {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Trust == "" {
		cfg.Trust = TrustHost
	}
	return &Resolver{cfg: cfg, layers: layerCache{dir: cfg.LayersDir}, shared: &shared{dirs: cfg.Shared}}
}

// Sources of an image's bytes, as Image.Source, Stats and logs call them.
const (
	SourceVirtioFS = "virtio-fs"
	SourceRelay    = "relay"
	SourceRegistry = "registry"
)

// Image is what a container shall run.
type Image struct {
	Reference string // normalised; together with Manifest it finds the image again
	Manifest  digest.Digest
	Config    []byte // OCI JSON
	Layers    []ocispec.Descriptor
	DiffIDs   []digest.Digest // of Layers
	Source    string          // where the bytes come from, as long as that works

	// Local is the path of the node's image file, which can be mounted as it is;
	// there is no Index then: see ReadIndex. "" when there is none, or when the
	// bytes are to be verified here.
	Local string
	// Start is what the node knows and wants to know of the container's start.
	Start Start
	// Index is nil when the image cannot be mounted lazily; Reason says why.
	Index  *index.Image
	Reason error

	found *image.Image
	blobs *registry.Repository
}

// errPolicy refuses what no other source can make good.
var errPolicy = fmt.Errorf("policy of the guest: %w", errdefs.ErrPermissionDenied)

// pin is what is known before anything was read.
type pin struct {
	name     reference.Named
	manifest digest.Digest // "" when nobody has pinned it
	asked    digest.Digest // of the manifest, or an index above it, that the guest was asked for; "" if unknown
	trust    Trust
	node     bool // the node knows it
	start    Start
}

// Resolve finds the image of container id. ref is what the caller was told and
// may be empty. With whole, the index is left out: the layers will be unpacked.
func (r *Resolver) Resolve(ctx context.Context, id, ref string, whole bool, phases *timing.Phases) (*Image, error) {
	if whole && r.cfg.PreferRegistry && ref != "" {
		return r.fromRegistry(ctx, ref, true, phases)
	}
	p, err := r.describe(ctx, id, ref, phases)
	if err == nil {
		var img *Image
		if img, err = r.fromNode(ctx, p, whole, phases); err == nil {
			return img, nil
		}
	}
	if r.cfg.Registry == nil || ref == "" || ctx.Err() != nil || errors.Is(err, errPolicy) {
		return nil, err
	}
	r.cfg.Log.Warn("the node cannot serve: asking the registry", "container", id, "reference", ref, "error", err)
	img, rerr := r.fromRegistry(ctx, ref, whole, phases)
	if rerr != nil {
		return nil, errors.Join(rerr, fmt.Errorf("before that, the node: %w", err))
	}
	return img, nil
}

// describe asks the node for the container.
func (r *Resolver) describe(ctx context.Context, id, ref string, phases *timing.Phases) (pin, error) {
	if r.cfg.Host == nil || r.cfg.Relay == nil {
		return pin{}, fmt.Errorf("describe container %s: no node is configured (host_address, relay_address): %w", id, errdefs.ErrUnavailable)
	}
	defer phases.Begin("describe")()
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	resp, err := r.cfg.Host.Describe(ctx, &api.DescribeRequest{ContainerId: id})
	if err != nil {
		return pin{}, fmt.Errorf("describe container %s: %w", id, err)
	}
	p, err := r.pinned(resp)
	if err == nil && p.trust == TrustImage {
		p.asked, err = askedDigest(ref)
	}
	if err != nil {
		return pin{}, fmt.Errorf("describe container %s: %w", id, err)
	}
	return p, nil
}

// askedDigest is the digest in the reference that the guest was given, if any.
func askedDigest(ref string) (digest.Digest, error) {
	if ref == "" {
		return "", nil
	}
	name, err := image.ParseReference(ref)
	if err != nil {
		return "", err
	}
	if d, ok := name.(reference.Digested); ok {
		return d.Digest(), nil
	}
	return "", nil
}

// pinned checks what the node says.
func (r *Resolver) pinned(resp *api.DescribeResponse) (pin, error) {
	name, err := image.ParseReference(resp.Reference)
	if err != nil {
		return pin{}, err
	}
	if resp.Repository != "" && resp.Repository != reference.Path(name) {
		if name, err = reference.WithName(reference.Domain(name) + "/" + resp.Repository); err != nil {
			return pin{}, fmt.Errorf("repository %q: %w: %w", resp.Repository, err, errdefs.ErrInvalidArgument)
		}
	}
	p := pin{name: name, manifest: digest.Digest(resp.ManifestDigest), trust: Trust(resp.Trust), node: true, start: startOf(resp)}
	if err := p.manifest.Validate(); err != nil {
		return pin{}, fmt.Errorf("manifest digest %q: %w: %w", resp.ManifestDigest, err, errdefs.ErrInvalidArgument)
	}
	switch p.trust {
	case TrustHost, "":
		p.trust = r.cfg.Trust
	case TrustImage:
	default:
		return pin{}, fmt.Errorf("%s asks for trust %q, which this guest cannot check: use \"host\" or \"image\": %w", resp.Reference, p.trust, errPolicy)
	}
	return p, nil
}

// Sources returns where the segments of an image of size bytes come from, in the
// order in which they are asked. It reads nothing, so that a new process can
// serve what an earlier one mounted.
func (r *Resolver) Sources(ref string, manifest digest.Digest, size int64) ([]store.Source, error) {
	name, err := image.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	var all []store.Source
	if r.verifiesShared() {
		all = append(all, &sharedSource{files: r.shared, manifest: manifest, size: size, trust: r.cfg.Trust})
	}
	if r.cfg.Relay != nil {
		all = append(all, relaySource{r.cfg.Relay.Mirror(relayHost, name), r.cfg.Trust})
	}
	if r.cfg.Registry != nil {
		all = append(all, &registrySource{repo: r.cfg.Registry.Repository(name), layers: &r.layers})
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("read %s: neither relay_address nor registry is configured: %w", ref, errdefs.ErrFailedPrecondition)
	}
	return all, nil
}

// verifiesShared says whether the node's image files are a source like the others.
// Where the node's word counts they are mounted themselves, and if they cannot
// be, reading them is no better.
func (r *Resolver) verifiesShared() bool { return len(r.cfg.Shared) > 0 && r.cfg.Trust == TrustImage }

// Blobs is where the image's whole layers come from.
func (i *Image) Blobs() *registry.Repository { return i.blobs }
