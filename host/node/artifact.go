package node

import (
	"encoding/json"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// artifact returns the manifest under which an index is found as a referrer of
// its image (image-spec, "Guidelines for Artifact Usage"). It depends on the
// arguments alone.
func artifact(subject, blob ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: index.ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{blob},
		Subject:      &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	}
	data, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("encode index artifact: %w", err)
	}
	desc := describe(ocispec.MediaTypeImageManifest, data)
	desc.ArtifactType = index.ArtifactType
	return desc, data, nil
}

func describe(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}
