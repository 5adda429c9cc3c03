package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// Has says whether an image is on the node.
func (n *Node) Has(manifest digest.Digest) bool {
	_, ok := n.known(manifest)
	return ok
}

// Layers is how many layers an image has; 0 when it is not on the node.
func (n *Node) Layers(manifest digest.Digest) int {
	r, ok := n.known(manifest)
	if !ok {
		return 0
	}
	return len(r.Blobs)
}

// PrepareManifest is Prepare for who knows already which manifest ref means. The
// tag is still asked first, as an image index may bind what makes preparing
// cheap; where it means something else by now, the digest counts.
func (n *Node) PrepareManifest(ctx context.Context, ref string, manifest digest.Digest) (*Prepared, error) {
	named, err := image.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	if n.Has(manifest) {
		n.mu.Lock()
		r := n.images[manifest]
		n.mu.Unlock()
		if r != nil && r.countsFor(named) {
			return n.prepared(named, manifest)
		}
	}
	if _, tagged := named.(reference.Tagged); tagged {
		if p, err := n.prepareOnly(ctx, ref, "", manifest); err == nil {
			return p, nil
		}
	}
	pinned, err := reference.WithDigest(reference.TrimNamed(named), manifest)
	if err != nil {
		return nil, fmt.Errorf("pin %s to %s: %w: %w", ref, manifest, err, errdefs.ErrInvalidArgument)
	}
	return n.Prepare(ctx, pinned.String(), "")
}

// DiffIDs lists the digests of the image's plain layers, the lowest first.
func (p *Prepared) DiffIDs() ([]digest.Digest, error) {
	var config ocispec.Image
	if err := json.Unmarshal(p.Config, &config); err != nil {
		return nil, fmt.Errorf("configuration of image %s: %w: %w", p.Manifest, err, errdefs.ErrInvalidArgument)
	}
	return config.RootFS.DiffIDs, nil
}

// Verified says whether the node has made all layer indexes of an image from
// their blobs: then it has compared their diffIDs with those of the image's
// configuration. A table of contents of the publisher cannot be held against a
// diffID before the whole layer is there. ErrNotFound when the image is not on
// the node.
func (n *Node) Verified(manifest digest.Digest) (bool, error) {
	r, ok := n.known(manifest)
	if !ok {
		return false, fmt.Errorf("image %s: %w", manifest, errdefs.ErrNotFound)
	}
	return !slices.ContainsFunc(r.Layers, func(l layerRecord) bool { return l.By != "" }), nil
}

// File is an image as one address space, and the right to read it.
type File struct {
	lease *Lease
	image *store.Image
	close func() error
}

// ReadAt reads verified bytes, fetching what is missing. An image whose index was
// found forged is ErrDataLoss.
func (f *File) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := f.lease.n.forgedIn(f.lease.record); err != nil {
		return 0, fmt.Errorf("read image %s: %w", f.lease.Manifest(), err)
	}
	return f.image.ReadAt(ctx, p, off)
}

// Size is the length of the one-file image in bytes.
func (f *File) Size() int64 { return f.image.Size() }

// SetFlow says for whom it is read (store.Image.SetFlow).
func (f *File) SetFlow(to *sched.Flow) { f.image.SetFlow(to) }

// Flow is for whom it is read.
func (f *File) Flow() *sched.Flow { return f.image.Flow() }

// Close ends the right to read. It is idempotent.
func (f *File) Close() error { return f.close() }

// File turns the lease into a file; closing that closes the lease.
func (l *Lease) File() *File {
	return &File{l, l.open, func() error { l.Close(); return nil }}
}

// Prefix opens the lowest count layers of an image as an image of their own:
// what another image sees that has these layers, too. The file owns the
// lease, also when Prefix fails.
func (l *Lease) Prefix(ctx context.Context, count int) (*File, error) {
	f, err := l.prefix(ctx, count)
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("open the lowest %d layers of image %s: %w", count, l.Manifest(), err)
	}
	return f, nil
}

func (l *Lease) prefix(ctx context.Context, count int) (*File, error) {
	r := l.record
	switch {
	case len(r.Layers) != len(r.Blobs):
		return nil, fmt.Errorf("the image's layers cannot be told apart (Nydus): %w", errdefs.ErrNotImplemented)
	case count < 1 || count > len(r.Layers):
		return nil, fmt.Errorf("it has %d layers: %w", len(r.Layers), errdefs.ErrInvalidArgument)
	}
	layers := make([]*index.Layer, count)
	for i := range layers {
		var err error
		if layers[i], err = l.n.readLayer(r.Layers[i].key()); err != nil {
			return nil, err
		}
	}
	built, err := bootstrap.Build(prefixName(r.Manifest.Digest, count), layers)
	if err != nil {
		return nil, err
	}
	open, err := l.n.store.OpenImage(ctx, built, []store.Source{&source{n: l.n, repo: l.repo, layers: r.Layers}})
	if err != nil {
		return nil, err
	}
	return &File{l, open, sync.OnceValue(func() error { return l.closePrefix(open) })}, nil
}

// prefixName names the image of a prefix in the store; nothing else has it.
func prefixName(manifest digest.Digest, count int) digest.Digest {
	return digest.FromString(fmt.Sprintf("%s, lowest %d layers", manifest, count))
}

// closePrefix also takes the prefix out of the store, unless it is open
// elsewhere.
func (l *Lease) closePrefix(open *store.Image) error {
	defer l.Close()
	name := open.Manifest()
	err := open.Close()
	rerr := l.n.store.Remove(name)
	if errdefs.IsNotFound(rerr) || errdefs.IsFailedPrecondition(rerr) {
		rerr = nil
	}
	return errors.Join(err, rerr)
}

// LayerUsage is how many bytes of disk the node keeps of one layer of an image (0 is
// the lowest), if no lower one has the same data. What another layer has, too, counts
// for the one that came first.
func (n *Node) LayerUsage(ref string, manifest digest.Digest, layer int) (int64, error) {
	named, _, err := parseTarget(ref, "")
	if err != nil {
		return 0, err
	}
	r, ok := n.known(manifest)
	if !ok || !r.countsFor(named) {
		return 0, fmt.Errorf("image %s is not on the node: prepare it first: %w", ref, errdefs.ErrNotFound)
	}
	if layer < 0 || layer >= len(r.Blobs) {
		return 0, fmt.Errorf("image %s has %d layers: %w", manifest, len(r.Blobs), errdefs.ErrInvalidArgument)
	}
	blob := r.Blobs[layer].Digest
	if _, lower := find(blob, r.Blobs[:layer]...); lower {
		return 0, nil
	}
	sum := int64(0)
	for _, s := range r.Segments {
		if s.Layer == blob {
			sum += n.store.Kept(s.ID, s.Size)
		}
	}
	return sum, nil
}
