package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds of what is accepted; real images stay far below.
const (
	MaxLayers    = 512
	MaxConfig    = 8 << 20 // bytes
	maxManifests = 1024    // in an index
	maxName      = 256     // bytes of a media type
)

// Docker's media types of manifests, lists and configs.
const (
	dockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	dockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig       = "application/vnd.docker.container.image.v1+json"
	dockerSchema1      = "application/vnd.docker.distribution.manifest.v1" // +json, +prettyjws
)

// document is a manifest or an index: exactly one of the fields is set.
type document struct {
	index    *ocispec.Index
	manifest *ocispec.Manifest
}

// decode parses data, which was served as mediaType, and checks everything
// that the bytes alone can tell.
func decode(data []byte, mediaType string) (document, error) {
	switch {
	case mediaType == ocispec.MediaTypeImageIndex, mediaType == dockerManifestList:
		index, err := decodeIndex(data, mediaType)
		return document{index: index}, err
	case mediaType == ocispec.MediaTypeImageManifest, mediaType == dockerManifest:
		m, err := decodeManifest(data, mediaType)
		return document{manifest: m}, err
	case strings.HasPrefix(mediaType, dockerSchema1):
		return document{}, invalid("the manifest is of Docker's schema 1, which is obsolete: push the image again with a current tool")
	}
	return document{}, invalid("media type %q is not that of an image", short(mediaType))
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), errdefs.ErrInvalidArgument)
}

func short(s string) string {
	return s[:min(len(s), maxName)]
}

func decodeIndex(data []byte, mediaType string) (*ocispec.Index, error) {
	var doc ocispec.Index
	if err := unmarshal(data, mediaType, &doc); err != nil {
		return nil, err
	}
	if len(doc.Manifests) > maxManifests {
		return nil, invalid("the index has %d manifests, more than %d", len(doc.Manifests), maxManifests)
	}
	for i, d := range doc.Manifests {
		if err := check(d); err != nil {
			return nil, fmt.Errorf("manifest %d of the index: %w", i, err)
		}
	}
	return &doc, nil
}

func decodeManifest(data []byte, mediaType string) (*ocispec.Manifest, error) {
	var doc ocispec.Manifest
	if err := unmarshal(data, mediaType, &doc); err != nil {
		return nil, err
	}
	if len(doc.Layers) > MaxLayers {
		return nil, invalid("the image has %d layers, more than %d", len(doc.Layers), MaxLayers)
	}
	if err := check(doc.Config); err != nil {
		return nil, fmt.Errorf("config of the manifest: %w", err)
	}
	if t := doc.Config.MediaType; t != ocispec.MediaTypeImageConfig && t != dockerConfig {
		return nil, invalid("this is no container image but an artifact: its config is of media type %q", short(t))
	}
	if doc.Config.Size > MaxConfig {
		return nil, invalid("the config has %d bytes, more than %d", doc.Config.Size, MaxConfig)
	}
	for i, d := range doc.Layers {
		if err := check(d); err != nil {
			return nil, fmt.Errorf("layer %d of the manifest: %w", i, err)
		}
	}
	return &doc, nil
}

// unmarshal decodes a document that says it is of mediaType, if anything, and
// that cannot be read as an index and as a manifest (CVE-2021-41190).
func unmarshal(data []byte, mediaType string, doc any) error {
	var probe struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(data, &probe); err != nil {
		return fmt.Errorf("decode the manifest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if probe.SchemaVersion != 2 {
		return invalid("schema version %d of a manifest is not known", probe.SchemaVersion)
	}
	if probe.MediaType != "" && probe.MediaType != mediaType {
		return invalid("the manifest is of media type %q but was served as %q", short(probe.MediaType), short(mediaType))
	}
	if probe.Manifests != nil && (probe.Config != nil || probe.Layers != nil) {
		return invalid("the document is an index and a manifest at the same time")
	}
	if err := json.Unmarshal(data, doc); err != nil {
		return fmt.Errorf("decode the manifest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func check(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", short(d.Digest.String()), err, errdefs.ErrInvalidArgument)
	}
	if d.Size < 0 {
		return invalid("a size of %d bytes", d.Size)
	}
	return nil
}

// decodeConfig parses a config and returns the diffIDs of layers layers.
func decodeConfig(data []byte, layers int) (ocispec.Image, []digest.Digest, error) {
	var config ocispec.Image
	if err := json.Unmarshal(data, &config); err != nil {
		return config, nil, fmt.Errorf("decode the config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	ids := config.RootFS.DiffIDs
	if len(ids) != layers {
		return config, nil, invalid("the manifest has %d layers, the config %d diffIDs", layers, len(ids))
	}
	for i, id := range ids {
		if err := id.Validate(); err != nil {
			return config, nil, fmt.Errorf("diffID %d of the config: %w", i, errors.Join(err, errdefs.ErrInvalidArgument))
		}
	}
	return config, ids, nil
}
