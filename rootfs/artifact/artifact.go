package artifact

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Annotations.
const (
	// AnnotationLayer names, at a layer file's descriptor, the blob of the layer
	// that the file is of.
	AnnotationLayer = "vnd.tatami.index.layer"
	// AnnotationImage names, at an artifact's descriptor in an image index, the
	// manifest that the artifact is of.
	AnnotationImage = "vnd.tatami.index.image"
)

// maxFiles bounds the layer files of one artifact.
const maxFiles = 1024

// New returns the manifest of an artifact with the given files, and its
// descriptor. It depends on the arguments alone.
func New(subject ocispec.Descriptor, files ...ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: index.ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       files,
		Subject:      &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	}
	data, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("encode index artifact: %w", err)
	}
	desc := Describe(ocispec.MediaTypeImageManifest, data)
	desc.ArtifactType = index.ArtifactType
	return desc, data, nil
}

// Describe names data.
func Describe(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// LayerFile describes an encoded layer file of the layer with the given blob.
func LayerFile(blob digest.Digest, encoded []byte) ocispec.Descriptor {
	desc := Describe(index.LayerType, encoded)
	desc.Annotations = map[string]string{AnnotationLayer: blob.String()}
	return desc
}

// Bind returns desc, an artifact of the given image manifest, as an image index
// lists it.
func Bind(desc ocispec.Descriptor, manifest digest.Digest) ocispec.Descriptor {
	desc.ArtifactType = index.ArtifactType
	desc.Annotations = map[string]string{AnnotationImage: manifest.String()}
	desc.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	return desc
}

// Bound returns the artifact that an image index lists for one of its manifests.
func Bound(parent *ocispec.Index, manifest digest.Digest) (ocispec.Descriptor, bool) {
	if parent == nil {
		return ocispec.Descriptor{}, false
	}
	for _, d := range parent.Manifests {
		if d.ArtifactType == index.ArtifactType && d.Annotations[AnnotationImage] == manifest.String() {
			return d, true
		}
	}
	return ocispec.Descriptor{}, false
}

// Files are the files of one artifact.
type Files struct {
	Image  *ocispec.Descriptor                  // an index.Image, nil if there is none
	Layers map[digest.Digest]ocispec.Descriptor // layer files by the blob they are of
}

// Decode reads an artifact's manifest, which must be one of the given image.
func Decode(data []byte, manifest digest.Digest) (*Files, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("decode index artifact: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	switch {
	case m.ArtifactType != index.ArtifactType:
		return nil, fmt.Errorf("artifact of type %.80q is no index: %w", m.ArtifactType, errdefs.ErrInvalidArgument)
	case m.Subject == nil || m.Subject.Digest != manifest:
		return nil, fmt.Errorf("index artifact is not of manifest %s: %w", manifest, errdefs.ErrInvalidArgument)
	case len(m.Layers) > maxFiles:
		return nil, fmt.Errorf("index artifact with %d files, more than %d: %w", len(m.Layers), maxFiles, errdefs.ErrInvalidArgument)
	}
	return byKind(m.Layers)
}

func byKind(list []ocispec.Descriptor) (*Files, error) {
	files := &Files{Layers: map[digest.Digest]ocispec.Descriptor{}}
	for i, d := range list {
		if err := d.Digest.Validate(); err != nil || d.Size < 0 {
			return nil, fmt.Errorf("index artifact: file %d has digest %.80q, size %d: %w", i, d.Digest, d.Size, errdefs.ErrInvalidArgument)
		}
		switch d.MediaType {
		case index.ImageType:
			files.Image = &list[i]
		case index.LayerType:
			files.Layers[digest.Digest(d.Annotations[AnnotationLayer])] = d
		}
	}
	return files, nil
}
