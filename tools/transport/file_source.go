package transport

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

var _ Source = (*fileSource)(nil)

// fileSource is images in files, of a directory or of an archive.
type fileSource struct {
	files  files
	object string                   // which image is meant; "" is the only one
	roots  []root                   // images and referrers that are listed
	path   map[digest.Digest]string // where blobs are, else in the place of an OCI layout
	made   map[digest.Digest][]byte // manifests that are in no file
}

// root is a manifest or index that is listed by name.
type root struct {
	ocispec.Descriptor
	names []string // which mean it
}

// GetManifest implements image.Registry.
func (s *fileSource) GetManifest(_ context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	desc, err := s.find(cmp.Or(ref, s.object))
	if err != nil {
		return desc, nil, err
	}
	data, err := s.read(desc)
	if err != nil {
		return desc, nil, err
	}
	desc.Size = int64(len(data))
	if desc.MediaType == "" {
		desc.MediaType = sniff(data)
	}
	return desc, data, nil
}

// find returns the descriptor of what ref means. Size and media type are those
// that are listed, or 0 and "".
func (s *fileSource) find(ref string) (ocispec.Descriptor, error) {
	if d, err := digest.Parse(ref); err == nil {
		for _, r := range s.roots {
			if r.Digest == d {
				return r.Descriptor, nil
			}
		}
		return ocispec.Descriptor{Digest: d}, nil
	}
	if ref == "" {
		return s.only()
	}
	for _, r := range s.roots {
		if slices.Contains(r.names, ref) {
			return r.Descriptor, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("no image is called %q; there is: %s: %w", ref, s.list(), errdefs.ErrNotFound)
}

// only returns the image that stands alone.
func (s *fileSource) only() (ocispec.Descriptor, error) {
	var images []ocispec.Descriptor
	for _, r := range s.roots {
		if slices.ContainsFunc(images, func(d ocispec.Descriptor) bool { return d.Digest == r.Digest }) {
			continue
		}
		data, err := s.read(r.Descriptor)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if subject, _ := registry.Referrer(r.Descriptor, data); subject == "" {
			images = append(images, r.Descriptor)
		}
	}
	switch len(images) {
	case 0:
		return ocispec.Descriptor{}, fmt.Errorf("there is no image: %w", errdefs.ErrNotFound)
	case 1:
		return images[0], nil
	}
	return ocispec.Descriptor{}, fmt.Errorf("there are %d images; add the name of one of these: %s: %w", len(images), s.list(), errdefs.ErrInvalidArgument)
}

// maxListed bounds the names in an error.
const maxListed = 16

func (s *fileSource) list() string {
	var names []string
	for _, r := range s.roots {
		if len(names) == maxListed {
			names = append(names, "…")
			break
		}
		name := r.Digest.String()
		if len(r.names) > 0 {
			name = r.names[0]
		}
		names = append(names, fmt.Sprintf("%.200q", name))
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}

// Manifest implements image.Registry.
func (s *fileSource) Manifest(_ context.Context, desc ocispec.Descriptor) ([]byte, error) {
	return s.read(desc)
}

// read reads a manifest; a desc of size 0 takes any up to registry.MaxManifest.
func (s *fileSource) read(desc ocispec.Descriptor) ([]byte, error) {
	data, err := s.readBlob(desc.Digest, registry.MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
	}
	if desc.Size != 0 && desc.Size != int64(len(data)) {
		return nil, fmt.Errorf("manifest %s has %d bytes, its descriptor says %d: %w", desc.Digest, len(data), desc.Size, errdefs.ErrDataLoss)
	}
	return data, nil
}

// Blob implements image.Registry.
func (s *fileSource) Blob(_ context.Context, desc ocispec.Descriptor) ([]byte, error) {
	data, err := s.readBlob(desc.Digest, registry.MaxBlob)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	if desc.Size != int64(len(data)) {
		return nil, fmt.Errorf("blob %s has %d bytes, its descriptor says %d: %w", desc.Digest, len(data), desc.Size, errdefs.ErrDataLoss)
	}
	return data, nil
}

func (s *fileSource) readBlob(d digest.Digest, limit int64) ([]byte, error) {
	if data, ok := s.made[d]; ok {
		return data, nil
	}
	name, err := s.name(d)
	if err != nil {
		return nil, err
	}
	data, err := readFile(s.files, name, limit)
	if err != nil {
		return nil, err
	}
	if got := d.Algorithm().FromBytes(data); got != d {
		return nil, fmt.Errorf("%s has digest %s: %w", name, got, errdefs.ErrDataLoss)
	}
	return data, nil
}

// name returns the file of a blob.
func (s *fileSource) name(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("digest %.100q: %w: %w", d, err, errdefs.ErrInvalidArgument)
	}
	if name, ok := s.path[d]; ok {
		return name, nil
	}
	return blobPath(d), nil
}

// blobPath is where an OCI layout has a blob (image-spec, image-layout.md).
func blobPath(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

func (s *fileSource) openBlob(desc ocispec.Descriptor) (file, error) {
	name, err := s.name(desc.Digest)
	if err != nil {
		return nil, err
	}
	f, err := s.files.open(name)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	if f.Size() != desc.Size {
		err := fmt.Errorf("blob %s has %d bytes, its descriptor says %d: %w", desc.Digest, f.Size(), desc.Size, errdefs.ErrDataLoss)
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Open implements Blobs.
func (s *fileSource) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	f, err := s.openBlob(desc)
	if err != nil {
		return nil, err
	}
	all := &whole{ctx: ctx, r: io.NewSectionReader(f, 0, desc.Size), left: desc.Size}
	return verified{registry.Verify(all, desc), f}, nil
}

// LayerBlob implements Blobs.
func (s *fileSource) LayerBlob(desc ocispec.Descriptor) layer.Blob {
	return fileBlob{open: func() (file, error) { return s.openBlob(desc) }, size: desc.Size}
}

// Referrers implements Source: in a layout they are manifests like others.
func (s *fileSource) Referrers(_ context.Context, dgst digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	var list []ocispec.Descriptor
	for _, r := range s.roots {
		data, err := s.read(r.Descriptor)
		if err != nil {
			return nil, fmt.Errorf("look for referrers of %s: %w", dgst, err)
		}
		plain := ocispec.Descriptor{MediaType: r.MediaType, Digest: r.Digest, Size: int64(len(data))}
		subject, listed := registry.Referrer(plain, data)
		known := slices.ContainsFunc(list, func(d ocispec.Descriptor) bool { return d.Digest == listed.Digest })
		if subject == dgst && !known && (artifactType == "" || listed.ArtifactType == artifactType) {
			list = append(list, listed)
		}
	}
	return list, nil
}

// Close implements Source.
func (s *fileSource) Close() error { return s.files.Close() }

// sniff takes the media type out of a manifest that no descriptor describes.
func sniff(data []byte) string {
	var doc struct {
		MediaType string            `json:"mediaType"`
		Manifests []json.RawMessage `json:"manifests"`
	}
	switch {
	case json.Unmarshal(data, &doc) != nil:
		return ""
	case doc.MediaType != "":
		return doc.MediaType
	case doc.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	}
	return ocispec.MediaTypeImageManifest
}
