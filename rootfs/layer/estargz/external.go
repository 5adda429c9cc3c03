package estargz

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/toc"
)

// How an image is found that has the TOCs of another image's layers, and which
// layer each of its own is for (stargz-snapshotter,
// nativeconverter/estargz/externaltoc).
const (
	externalSuffix = "-esgztoc"
	externalLayer  = "containerd.io/snapshot/stargz/layer.digest"
)

// maxManifest bounds a manifest, as registries do, in bytes.
const maxManifest = 4 << 20

// Manifests is the repository that an image is in.
type Manifests interface {
	// GetManifest returns the manifest that a tag names; ErrNotFound if there is
	// none.
	GetManifest(ctx context.Context, tag string) ([]byte, error)
}

// FindExternal finds the blobs with the TOCs of layers of the image with a tag
// whose conversion put them into an image of its own (ctr-remote convert
// --estargz-external-toc). The result is by the layers' digests; layers that are
// not eStargz or have no such TOC are not in it. An image that has none, or no
// image of TOCs, is no error.
//
// Nothing binds that image: its tag can be moved by whoever may push. It only
// says where to look. What binds the TOC itself is the digest of its JSON that
// the layer's own manifest has (annotation TOCDigest), which OpenExternal
// checks: so a TOC found this way is as trustworthy as one in the blob.
//
// Errors: ErrInvalidArgument for something that is not such an image; those of
// repo as they are.
func FindExternal(ctx context.Context, repo Manifests, tag string, layers []layer.Descriptor) (map[digest.Digest]layer.Descriptor, error) {
	wanted := map[string]bool{}
	for _, l := range layers {
		if _, ok := TOC(l.Annotations); ok {
			wanted[l.Digest.String()] = true
		}
	}
	if len(wanted) == 0 {
		return nil, nil
	}
	tag += externalSuffix
	b, err := repo.GetManifest(ctx, tag)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("image of TOCs %q: %w", tag, err)
	}
	found, err := parseExternal(b, wanted)
	if err != nil {
		return nil, fmt.Errorf("image of TOCs %q: %w", tag, err)
	}
	return found, nil
}

// parseExternal finds the TOCs of wanted layers in the manifest of their image.
func parseExternal(b []byte, wanted map[string]bool) (map[digest.Digest]layer.Descriptor, error) {
	if len(b) > maxManifest {
		return nil, toc.Invalid(fmt.Errorf("manifest of %d bytes is over %d", len(b), maxManifest))
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, toc.Invalid(fmt.Errorf("manifest: %w", err))
	}
	found := map[digest.Digest]layer.Descriptor{}
	for _, l := range m.Layers {
		of := l.Annotations[externalLayer]
		if !wanted[of] {
			continue
		}
		if err := l.Digest.Validate(); err != nil {
			return nil, toc.Invalid(fmt.Errorf("TOC of layer %s: digest %.80q: %w", of, l.Digest, err))
		}
		if l.Size <= 0 || l.Size > toc.MaxSize {
			return nil, toc.Invalid(fmt.Errorf("TOC of layer %s has %d bytes", of, l.Size))
		}
		found[digest.Digest(of)] = l
	}
	return found, nil
}

// OpenExternal makes a layer out of a TOC that is not in the layer's blob, whose
// descriptor is desc: packed is the blob with the TOC, size its length in bytes.
// sum is the TOC's digest from the manifest of the layer (annotation TOCDigest);
// it is what binds the TOC. Errors are those of Open.
func OpenExternal(packed io.Reader, size int64, desc layer.Descriptor, sum digest.Digest) (*index.Layer, error) {
	l, err := openExternal(packed, size, desc, sum)
	if err != nil {
		return nil, fmt.Errorf("open eStargz layer %s with an external TOC: %w", desc.Digest, err)
	}
	return l, nil
}

func openExternal(packed io.Reader, size int64, desc layer.Descriptor, sum digest.Digest) (*index.Layer, error) {
	json, err := unpackTOC(io.LimitReader(packed, size), size)
	if err != nil {
		return nil, err
	}
	return parse(json, desc, desc.Size, sum)
}
