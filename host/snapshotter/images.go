package snapshotter

import (
	"context"
	"os"

	"github.com/opencontainers/go-digest"
)

// Chain is a stack of layers: the lowest Layers layers of an image.
type Chain struct {
	Reference string        // under which the image was pulled
	Manifest  digest.Digest // of the image's manifest
	Layers    int           // how many of the image's layers, from the lowest
	Of        int           // how many layers the image has
}

// Whole says whether the chain is the entire image. When it is not, the
// container's image is another one, which has these layers too.
func (c Chain) Whole() bool { return c.Layers == c.Of }

// Tree is what a snapshot needs to know of an image that is mounted.
type Tree struct {
	UID, GID int         // of the root
	Mode     os.FileMode // of the root
	// Files has the content of regular files, links followed as in a container.
	Files map[string][]byte
}

// Images is what a snapshotter needs of the node. A holder is an opaque plain
// word that begins with the snapshotter's name and a dot ("tatami.<random>").
// All methods may be called at the same time; they return early with the
// context's error when it ends.
type Images interface {
	// Has says whether the node already has the image, whoever asked for it.
	Has(ctx context.Context, manifest digest.Digest) (bool, error)
	// Prepare fetches what is needed to serve the image lazily and returns
	// the diffIDs of its layers, the lowest first. Concurrent calls for one
	// image do the work once. ErrNotImplemented or ErrFailedPrecondition, with
	// the reason, when the image cannot be served lazily.
	Prepare(ctx context.Context, ref string, manifest digest.Digest) (diffIDs []digest.Digest, err error)
	// Verified says whether the diffID of every layer of a prepared image was
	// computed from its blob.
	Verified(ctx context.Context, manifest digest.Digest) (bool, error)
	// Mount returns the absolute path of a directory at which the chain is
	// mounted read-only. The mount lives until holder is released. Called
	// again, also after a restart of the machine, it gives what is there or
	// mounts again, and fetches what the node has lost. ErrNotImplemented when this machine cannot mount images.
	Mount(ctx context.Context, holder string, c Chain) (dir string, err error)
	// Look reads what a snapshot needs to know of a directory that Mount gave,
	// and those of the files that are there, of at most 1 MiB each. The caller must not read in it itself: the reads may need this process,
	// and one that is killed must not wait for itself.
	Look(ctx context.Context, dir string, files ...string) (Tree, error)
	// File returns the absolute path of the one-file EROFS image of the chain,
	// a regular file to stat(2). It lives as a mount does.
	File(ctx context.Context, holder string, c Chain) (path string, err error)
	// Release ends what Mount and File gave to holder; nothing is fine too.
	Release(ctx context.Context, holder string) error
	// Holders lists all who hold something, also before a restart.
	Holders(ctx context.Context) ([]string, error)
	// Usage is how many bytes the node keeps of the chain's topmost layer.
	Usage(ctx context.Context, c Chain) (bytes int64, err error)
	// Remove gives up an image that nothing of ours refers to any more. ErrNotFound
	// when the node does not have it, ErrFailedPrecondition while others use it.
	Remove(ctx context.Context, manifest digest.Digest) error
}
