package registrytest

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerConfig       = "application/vnd.docker.container.image.v1+json"
	DockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	DockerLayerGzip    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// Image is what PushImage builds from; lowest layer first.
type Image struct {
	Layers []Layer
	Config ocispec.ImageConfig
	// Platform is linux and this machine's architecture when empty.
	Platform    ocispec.Platform
	Annotations map[string]string
	Docker      bool // Docker's media types instead of OCI's
}

// Pushed is an image in the registry. Desc has the Platform, as an index wants it.
type Pushed struct {
	Desc     ocispec.Descriptor
	Manifest []byte
	Config   ocispec.Descriptor
	Layers   []ocispec.Descriptor
}

// PushImage adds the blobs, the config and the manifest of an image and tags
// it, unless tag is "".
func (s *Server) PushImage(name, tag string, img Image) Pushed {
	if img.Platform.OS == "" {
		img.Platform = ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	}
	manifestType, configType := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
	if img.Docker {
		manifestType, configType = DockerManifest, DockerConfig
	}
	config := ocispec.Image{Platform: img.Platform, Config: img.Config, RootFS: ocispec.RootFS{Type: "layers"}}
	layers := []ocispec.Descriptor{}
	for _, l := range img.Layers {
		desc := s.PushBlob(name, l.mediaType(img.Docker), l.Blob)
		desc.Annotations = l.Annotations
		layers = append(layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
	}
	p := Pushed{Layers: layers, Config: s.PushBlob(name, configType, encode(config))}
	p.Manifest = encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifestType,
		Config: p.Config, Layers: layers, Annotations: img.Annotations,
	})
	p.Desc = s.PushManifest(name, tag, manifestType, p.Manifest)
	p.Desc.Platform = &img.Platform
	return p
}

func (l Layer) mediaType(docker bool) string {
	if docker {
		switch l.MediaType {
		case ocispec.MediaTypeImageLayer:
			return DockerLayer
		case ocispec.MediaTypeImageLayerGzip:
			return DockerLayerGzip
		}
	}
	return l.MediaType
}

// PushIndex adds an index of images, in this order, and tags it. It is a
// Docker manifest list when docker is set.
func (s *Server) PushIndex(name, tag string, docker bool, images ...ocispec.Descriptor) ocispec.Descriptor {
	index := newIndex(images)
	if docker {
		index.MediaType = DockerManifestList
	}
	return s.PushManifest(name, tag, index.MediaType, encode(index))
}

// PushReferrer adds an artifact manifest whose subject is another manifest and
// whose layers are the given blobs, already pushed.
func (s *Server) PushReferrer(name string, subject ocispec.Descriptor, artifactType string, layers ...ocispec.Descriptor) ocispec.Descriptor {
	subject.Platform, subject.Annotations = nil, nil
	config := s.PushBlob(name, ocispec.MediaTypeEmptyJSON, []byte("{}"))
	desc := s.PushManifest(name, "", ocispec.MediaTypeImageManifest, encode(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: artifactType, Config: config, Layers: layers, Subject: &subject,
	}))
	desc.ArtifactType = artifactType
	return desc
}

func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode %T: %v", v, err)) // plain structs always encode
	}
	return data
}
