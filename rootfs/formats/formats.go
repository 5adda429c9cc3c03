package formats

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/nydus"
	"github.com/tatami-containers/tatami/rootfs/layer/soci"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Repository is where an image and what was published beside it are read from.
type Repository interface {
	image.Registry
	// Referrers lists the manifests whose subject is d; of all types when
	// artifactType is empty.
	Referrers(ctx context.Context, d digest.Digest, artifactType string) ([]ocispec.Descriptor, error)
}

// Layer is one layer of an image as it is merged. Its DiffID is empty if it is
// none of the image's config.
type Layer struct {
	image.Layer
	// Whole says that the blob is a tar that can be streamed, as a last resort.
	Whole bool
}

// Check compares what the layer's index says that it unpacks to, if it does,
// with what the image's config says.
func (l Layer) Check(made *index.Layer) error {
	if made.DiffID == "" || l.DiffID == "" {
		return nil
	}
	return l.CheckDiffID(made.DiffID)
}

// Way is one way to a layer's index.
type Way struct {
	From  string        // what kind it is of, one of the From constants
	By    digest.Digest // of what describes the layer
	Bound bool          // the manifest or the image index binds By
	Lazy  bool          // Open reads ranges of the blob
	// Open reads the index. fetched are the bytes that it took.
	Open func(ctx context.Context) (l *index.Layer, fetched int64, err error)
}

// Kinds of ways.
const (
	FromTOC   = "toc"   // a table of contents in the blob, or in an image of its own
	FromIndex = "index" // an index artifact
	FromSOCI  = "soci"  // an index of SOCI
	FromNydus = "nydus" // the bootstrap of a Nydus image
)

// Finder knows the ways to the layers of one image.
type Finder struct {
	repo  Repository
	blob  func(ocispec.Descriptor) layer.Blob
	image *image.Image
	log   *slog.Logger
	ztocs map[digest.Digest]soci.Ztoc // by the digests of layers; set by Discover

	external     sync.Once
	externalTOCs map[digest.Digest]layer.Descriptor // by the digests of layers; set by external
	externalErr  error

	// CPU is what reading an index waits for. Nobody has a turn while he waits for a
	// registry. Nil lets all compute.
	CPU *sched.Slots
	// Artifacts are the index artifacts that Discover has found, the best first.
	Artifacts []Artifact
	// Fetched is how many bytes of manifests Discover has read.
	Fetched int64
}

// Artifact is an index artifact of the image.
type Artifact struct {
	Desc  ocispec.Descriptor // of its manifest
	Data  []byte             // its manifest
	Files *artifact.Files
	Bound bool // the image index lists it
}

// New makes a Finder for img, whose blobs are had by blob.
func New(repo Repository, blob func(ocispec.Descriptor) layer.Blob, img *image.Image, log *slog.Logger) *Finder {
	return &Finder{repo: repo, blob: blob, image: img, log: log}
}

// Layers are what has to be merged to get the image, lowest first. It is of
// class ErrInvalidArgument when there is a layer that no way can lead to.
func (f *Finder) Layers() ([]Layer, error) {
	if bootstrap, _, ok := nydus.Detect(f.descriptors()); ok {
		return []Layer{{Layer: image.Layer{Descriptor: bootstrap}}}, nil
	}
	var out []Layer
	for _, l := range f.image.Layers {
		if err := layer.CheckMediaType(l.MediaType); err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		out = append(out, Layer{Layer: l, Whole: true})
	}
	return out, nil
}

func (f *Finder) descriptors() []layer.Descriptor {
	var out []layer.Descriptor
	for _, l := range f.image.Layers {
		out = append(out, l.Descriptor)
	}
	return out
}

// Ways lists the ways to a layer, the best first. Before Discover these are
// only those that the manifest itself tells.
func (f *Finder) Ways(l Layer) []Way {
	if nydus.IsBootstrap(l.Descriptor) {
		return []Way{f.nydusWay(l)}
	}
	out := f.fileWays(l, true)
	if way, ok := f.tocWay(l); ok {
		out = append(out, way)
	}
	out = append(out, f.fileWays(l, false)...)
	if ztoc, ok := f.ztocs[l.Digest]; ok {
		out = append(out, f.sociWay(l, ztoc))
	}
	return out
}
