package soci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Types and annotations of SOCI indexes. An index is an image manifest whose
// config has the index's type, and whose layers are the ztocs; the first ones
// were artifact manifests, which have an artifact type and blobs.
const (
	TypeV1 = "application/vnd.amazon.soci.index.v1+json" // has the image as its subject
	TypeV2 = "application/vnd.amazon.soci.index.v2+json" // is named by the image, or beside it

	ztocType = "application/octet-stream"

	indexDigest    = "com.amazon.soci.index-digest"          // on an image manifest: of its index
	manifestDigest = "com.amazon.soci.image-manifest-digest" // on an index's descriptor in an image index: of its image
	layerDigest    = "com.amazon.soci.image-layer-digest"    // on a ztoc's descriptor: of its layer
)

// MaxZtoc bounds ztocs in bytes. A 32 KiB window for each 4 MiB of a layer (the
// usual span) makes 256 MiB for one of 32 GiB.
const MaxZtoc = 256 << 20

// maxReferrers is how many referrers are tried until all layers have a ztoc.
const maxReferrers = 8

// Registry is the repository of an image.
type Registry interface {
	// Manifest reads the manifest that desc names, and checks its digest, and
	// its size if that is not 0.
	Manifest(ctx context.Context, desc ocispec.Descriptor) ([]byte, error)
	// Referrers lists the manifests of a type whose subject is dgst.
	Referrers(ctx context.Context, dgst digest.Digest, artifactType string) ([]ocispec.Descriptor, error)
}

// Image is what is known of an image for which ztocs are looked for.
type Image struct {
	Digest   digest.Digest // of Manifest
	Manifest []byte        // image manifest
	// Index is the image index that led to the manifest; nil if none did.
	Index *ocispec.Index
}

// Ztoc is a ztoc in the image's repository.
type Ztoc struct {
	Digest digest.Digest
	Size   int64 // bytes, 1 to MaxZtoc
	// Bound says that the image manifest or the image index names the ztoc's
	// index, so that it is as trustworthy as they are. Otherwise whoever may
	// write to the repository can have put it there.
	Bound bool
}

// Find returns the ztocs of an image by the digests of its layers. Not every
// layer has one: the tool leaves out those below 10 MiB. Indexes that are bound
// to the image come first; referrers are asked for only if there are none.
//
// The error does not make the ztocs found any worse: it tells, for the log, why
// indexes were passed over. They are ErrInvalidArgument if they do not fit the
// image or are not valid, else what the registry said.
func Find(ctx context.Context, reg Registry, img Image) (map[digest.Digest]Ztoc, error) {
	f := finder{reg: reg, img: img, layers: map[digest.Digest]bool{}, found: map[digest.Digest]Ztoc{}}
	if err := json.Unmarshal(img.Manifest, &f.manifest); err != nil {
		return nil, invalid(fmt.Errorf("image manifest %s: %w", img.Digest, err))
	}
	for _, l := range f.manifest.Layers {
		f.layers[l.Digest] = true
	}
	for _, desc := range f.bound() {
		f.try(ctx, desc, TypeV2)
	}
	if len(f.found) == 0 {
		f.referrers(ctx)
	}
	return f.found, errors.Join(f.errs...)
}

// finder looks for the ztocs of one image.
type finder struct {
	reg      Registry
	img      Image
	manifest ocispec.Manifest
	layers   map[digest.Digest]bool
	found    map[digest.Digest]Ztoc
	errs     []error
}

// bound lists the indexes that the image manifest and the image index name.
func (f *finder) bound() []ocispec.Descriptor {
	var list []ocispec.Descriptor
	named := digest.Digest(f.manifest.Annotations[indexDigest])
	if named != "" {
		list = append(list, ocispec.Descriptor{Digest: named})
	}
	if f.img.Index == nil {
		return list
	}
	for _, d := range f.img.Index.Manifests {
		about := digest.Digest(d.Annotations[manifestDigest])
		if d.ArtifactType == TypeV2 && about == f.img.Digest && d.Digest != named {
			list = append(list, d)
		}
	}
	return list
}

// referrers tries the indexes whose subject is the image.
func (f *finder) referrers(ctx context.Context) {
	list, err := f.reg.Referrers(ctx, f.img.Digest, TypeV1)
	if err != nil {
		f.errs = append(f.errs, fmt.Errorf("SOCI indexes of image %s: %w", f.img.Digest, err))
	}
	for _, desc := range list[:min(len(list), maxReferrers)] {
		if len(f.found) == len(f.layers) {
			return
		}
		f.try(ctx, desc, TypeV1)
	}
}

// try takes in the ztocs of an index for layers that have none yet.
func (f *finder) try(ctx context.Context, desc ocispec.Descriptor, wantType string) {
	if err := f.add(ctx, desc, wantType); err != nil {
		f.errs = append(f.errs, fmt.Errorf("SOCI index %.128s of image %s: %w", desc.Digest, f.img.Digest, err))
	}
}

func (f *finder) add(ctx context.Context, desc ocispec.Descriptor, wantType string) error {
	if err := desc.Digest.Validate(); err != nil {
		return invalid(err)
	}
	data, err := f.reg.Manifest(ctx, desc)
	if err != nil {
		return err
	}
	ztocs, err := f.decode(data, wantType)
	if err != nil {
		return invalid(err)
	}
	for _, z := range ztocs {
		f.addZtoc(z, wantType == TypeV2)
	}
	return nil
}

// decode returns the ztocs that an index lists, if it is of the type and about
// the image.
func (f *finder) decode(data []byte, wantType string) ([]ocispec.Descriptor, error) {
	var doc struct {
		ocispec.Manifest
		Blobs []ocispec.Descriptor `json:"blobs"` // of an artifact manifest
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	if doc.ArtifactType != wantType && doc.Config.MediaType != wantType {
		return nil, fmt.Errorf("it has type %.80q, config %.80q, not %s", doc.ArtifactType, doc.Config.MediaType, wantType)
	}
	switch {
	case doc.Subject == nil && wantType == TypeV1:
		return nil, errors.New("it has no subject")
	case doc.Subject != nil && doc.Subject.Digest != f.img.Digest:
		return nil, fmt.Errorf("its subject is %.128s", doc.Subject.Digest)
	}
	return append(doc.Layers, doc.Blobs...), nil
}

// addZtoc takes in one ztoc.
func (f *finder) addZtoc(z ocispec.Descriptor, bound bool) {
	of := digest.Digest(z.Annotations[layerDigest])
	if _, has := f.found[of]; has || z.MediaType != ztocType || !f.layers[of] {
		return
	}
	if err := z.Digest.Validate(); err != nil || z.Size < 1 || z.Size > MaxZtoc {
		f.errs = append(f.errs, invalid(fmt.Errorf("ztoc %.128s of layer %s has %d bytes, or no digest; up to %d are read",
			z.Digest, of, z.Size, int64(MaxZtoc))))
		return
	}
	f.found[of] = Ztoc{Digest: z.Digest, Size: z.Size, Bound: bound}
}
