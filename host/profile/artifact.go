package profile

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/pathlist"
)

// Media types of a published profile: an OCI manifest with an artifact type whose
// subject is the image's manifest (image-spec, "Guidelines for Artifact Usage"), as
// package artifact has them. Its layers are the profile, which names chunks of
// segments, and a list of paths, for nodes that have cut the layers otherwise.
const (
	ArtifactType = "application/vnd.tatami.profile.v1"
	RangesType   = "application/vnd.tatami.profile.ranges.v1+json"
	PathsType    = "application/vnd.tatami.profile.paths.v1"
)

// Artifact returns the manifest of a published profile, with its descriptor.
func Artifact(subject, ranges, paths ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	data, err := json.Marshal(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       []ocispec.Descriptor{ranges, paths},
		Subject:      &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	})
	if err != nil {
		return ocispec.Descriptor{}, nil, fmt.Errorf("encode profile artifact: %w", err)
	}
	desc := artifact.Describe(ocispec.MediaTypeImageManifest, data)
	desc.ArtifactType = ArtifactType
	return desc, data, nil
}

// Files finds the two files of a published profile of an image in its manifest.
func Files(data []byte, image digest.Digest) (ranges, paths ocispec.Descriptor, err error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return ranges, paths, fmt.Errorf("decode profile artifact: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if m.ArtifactType != ArtifactType || m.Subject == nil || m.Subject.Digest != image || len(m.Layers) > 16 {
		return ranges, paths, fmt.Errorf("artifact of type %.80q with %d files is no profile of image %s: %w",
			m.ArtifactType, len(m.Layers), image, errdefs.ErrInvalidArgument)
	}
	for _, l := range m.Layers {
		limit, into := int64(MaxEncoded), &ranges
		switch l.MediaType {
		case PathsType:
			limit, into = pathlist.MaxSize, &paths
		case RangesType:
		default:
			continue
		}
		if err := l.Digest.Validate(); err != nil || l.Size < 0 || l.Size > limit {
			return ranges, paths, fmt.Errorf("profile artifact: a file with digest %.80q, size %d: %w", l.Digest, l.Size, errdefs.ErrInvalidArgument)
		}
		*into = l
	}
	return ranges, paths, nil
}
