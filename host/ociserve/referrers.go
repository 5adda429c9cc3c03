package ociserve

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// List answers with those of all that have this artifactType, as an image index; with
// all when it is empty.
func List(w http.ResponseWriter, all []ocispec.Descriptor, artifactType string) error {
	answer := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
	for _, desc := range all {
		if artifactType == "" || artifactType == desc.ArtifactType {
			answer.Manifests = append(answer.Manifests, desc)
		}
	}
	body, err := json.Marshal(answer)
	if err != nil {
		return fmt.Errorf("encode referrers: %w", err)
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	if artifactType != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	_, err = w.Write(body)
	return Broken(err)
}
