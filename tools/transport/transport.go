package transport

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// Source is where one image is read from, with what belongs to it. Its methods
// may be called at the same time, except for Close.
type Source interface {
	// Registry reads manifests. GetManifest takes a tag or digest; "" is what
	// the source's name says.
	image.Registry
	Blobs
	// Referrers lists the manifests whose subject is dgst, with this
	// artifactType or, when it is empty, all of them.
	Referrers(ctx context.Context, dgst digest.Digest, artifactType string) ([]ocispec.Descriptor, error)
	Close() error
}

// Blobs are large contents.
type Blobs interface {
	// Open reads a whole blob. It ends with an error unless size and digest
	// are right.
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	// LayerBlob gives ranges of a blob, whose bytes are not verified.
	LayerBlob(desc ocispec.Descriptor) layer.Blob
}

// Dest is where images are written to. Its methods may be called at the same
// time, except for Close.
type Dest interface {
	// Has tells whether the manifest or blob is there already.
	Has(ctx context.Context, desc ocispec.Descriptor) (bool, error)
	// PushBlob writes the blob that desc names. Lost connections are made good
	// when r is an io.Seeker.
	PushBlob(ctx context.Context, desc ocispec.Descriptor, r io.Reader) error
	// PushStream writes a blob whose digest is known at its end.
	PushStream(ctx context.Context, mediaType string, r io.Reader) (ocispec.Descriptor, error)
	// PushManifest writes a manifest or index byte for byte, after all that it
	// names, and calls it tag. With tag "" it is found by its digest or, when it has a subject,
	// as a referrer.
	PushManifest(ctx context.Context, mediaType string, data []byte, tag string) (ocispec.Descriptor, error)
	// Mount takes a blob from a source that keeps it in the same place, without
	// reading it. It is false when there is no such way.
	Mount(ctx context.Context, desc ocispec.Descriptor, from Source) (bool, error)
	// Tag is what the destination's name says that the image is to be called.
	// PushManifest refuses a digest that is not the manifest's.
	Tag() string
	// Close completes a file, if one was to be written; its error counts.
	Close() error
}

// Options are what names alone do not tell.
type Options struct {
	// Registry is the client for names of registries. One client for source
	// and destination saves tokens and connections.
	Registry *registry.Client
}

// NewClient returns a registry client with the credentials of Docker's
// config.json. The hosts ("host:port") in plainHTTP speak HTTP without TLS.
func NewClient(plainHTTP []string) *registry.Client {
	return registry.New(registry.Config{
		PlainHTTP:   registry.PlainHTTPHosts(plainHTTP),
		Credentials: registry.DockerCredentials(),
	})
}

// OpenSource opens what n names for reading.
func OpenSource(n Name, opts Options) (Source, error) {
	switch n.Kind {
	case Registry:
		if opts.Registry == nil {
			return nil, errNoClient(n)
		}
		return newRegistrySource(n, opts.Registry), nil
	case Layout, OCIArchive, DockerArchive:
		s, err := openFiles(n)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", n, err)
		}
		return s, nil
	}
	return nil, errUnknownKind(n)
}

func openFiles(n Name) (*fileSource, error) {
	if n.Kind == Layout {
		return openLayout(n)
	}
	return openArchive(n)
}

// OpenDest opens what n names for writing. Directories and files are made.
func OpenDest(n Name, opts Options) (dst Dest, err error) {
	switch n.Kind {
	case Registry:
		if opts.Registry == nil {
			return nil, errNoClient(n)
		}
		return newRegistryDest(n, opts.Registry), nil
	case Layout:
		dst, err = newLayoutDest(n)
	case OCIArchive, DockerArchive:
		dst, err = newArchiveDest(n)
	default:
		return nil, errUnknownKind(n)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s for writing: %w", n, err)
	}
	return dst, nil
}

func errNoClient(n Name) error {
	return fmt.Errorf("open %s: no registry client was given: %w", n, errdefs.ErrInvalidArgument)
}

func errUnknownKind(n Name) error {
	return fmt.Errorf("open an image at a place of kind %q, which is not known: %w", n.Kind, errdefs.ErrInvalidArgument)
}

// Resolve reads the image that the source's name means, for one platform. name
// is what errors and the result call it.
func Resolve(ctx context.Context, src Source, name string, platform ocispec.Platform) (*image.Image, error) {
	return image.ResolveObject(ctx, src, "", name, platform)
}
