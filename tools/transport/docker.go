package transport

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
)

// dockerList is the file that makes an archive one of docker save (moby,
// image/spec/spec.md, "Combined Image JSON + Filesystem Changeset Format").
const dockerList = "manifest.json"

// dockerImage is an element of dockerList.
type dockerImage struct {
	Config   string   // file
	RepoTags []string // references with tags
	Layers   []string // files, the lowest first
}

// openArchive opens a tar archive: one with an OCI layout is read as such,
// which docker save makes since version 25; of others manifests are made.
func openArchive(n Name) (*fileSource, error) {
	t, err := openTar(n.Path)
	if err != nil {
		return nil, err
	}
	if _, ok := t.entries[ocispec.ImageLayoutFile]; ok || n.Kind == OCIArchive {
		return newArchivedLayout(t, n)
	}
	s, err := newDockerSource(t, n.Object)
	if err != nil {
		_ = t.Close() // nothing was written
		return nil, err
	}
	return s, nil
}

// newArchivedLayout takes over t. In an archive of docker save the names of
// dockerList count as well, as they do for docker load.
func newArchivedLayout(t *tarFile, n Name) (*fileSource, error) {
	s, err := newLayoutSource(t, n.Object)
	if err != nil || n.Kind == OCIArchive {
		return s, err
	}
	if s.object, err = dockerObject(n.Object); err == nil {
		err = s.addDockerNames()
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// addDockerNames gives the images of a layout the names of dockerList, which
// knows them by their configs.
func (s *fileSource) addDockerNames() error {
	var list []dockerImage
	if err := readJSON(s.files, dockerList, &list); err != nil {
		return fmt.Errorf("this is no archive of docker save: %w", err)
	}
	for i, r := range s.roots {
		data, err := s.read(r.Descriptor)
		if err != nil {
			return err
		}
		var m ocispec.Manifest
		if json.Unmarshal(data, &m) != nil || m.Config.Digest.Validate() != nil {
			continue // an index: its images are not named
		}
		for k, img := range list {
			if cleanName(img.Config) == blobPath(m.Config.Digest) {
				s.roots[i].names = append(r.names, img.names(k)...)
			}
		}
	}
	return nil
}

// names are what image number i of an archive can be called.
func (img dockerImage) names(i int) []string {
	names := []string{}
	for _, tag := range img.RepoTags {
		if named, err := reference.ParseDockerRef(tag); err == nil {
			names = append(names, named.String())
		}
	}
	return append(names, "@"+strconv.Itoa(i))
}

// dockerObject is a reference as docker writes it into an archive, with its
// tag; "" and "@0", the number of an image, stay as they are.
func dockerObject(object string) (string, error) {
	if object == "" || strings.HasPrefix(object, "@") {
		return object, nil
	}
	ref, err := image.ParseReference(object)
	if err != nil {
		return "", err
	}
	return ref.String(), nil
}

// newDockerSource makes manifests for the images of an archive. They have the
// layers as they are in the archive, so they depend on nothing else.
func newDockerSource(t *tarFile, object string) (*fileSource, error) {
	var list []dockerImage
	if err := readJSON(t, dockerList, &list); err != nil {
		return nil, fmt.Errorf("this is no archive of docker save: %w", err)
	}
	object, err := dockerObject(object)
	if err != nil {
		return nil, err
	}
	s := &fileSource{files: t, object: object, path: map[digest.Digest]string{}, made: map[digest.Digest][]byte{}}
	for i, img := range list {
		desc, err := s.addDocker(img)
		if err != nil {
			return nil, fmt.Errorf("image %d of %s: %w", i, dockerList, err)
		}
		s.roots = append(s.roots, root{Descriptor: desc, names: img.names(i)})
	}
	return s, nil
}

// addDocker makes the manifest of one image.
func (s *fileSource) addDocker(img dockerImage) (desc ocispec.Descriptor, err error) {
	data, err := readFile(s.files, img.Config, image.MaxConfig)
	if err != nil {
		return desc, fmt.Errorf("config: %w", err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(data, &config); err != nil {
		return desc, fmt.Errorf("decode config %.200q: %w: %w", img.Config, err, errdefs.ErrInvalidArgument)
	}
	ids := config.RootFS.DiffIDs
	if len(ids) != len(img.Layers) || len(ids) > image.MaxLayers {
		return desc, fmt.Errorf("there are %d layers, and %d diffIDs in the config; at most %d are read: %w", len(img.Layers), len(ids), image.MaxLayers, errdefs.ErrInvalidArgument)
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(data), Size: int64(len(data))},
		Layers: []ocispec.Descriptor{},
	}
	s.path[m.Config.Digest] = img.Config
	for i, name := range img.Layers {
		l, err := s.dockerLayer(name, ids[i])
		if err != nil {
			return desc, fmt.Errorf("layer %.200q: %w", name, err)
		}
		s.path[l.Digest] = name
		m.Layers = append(m.Layers, l)
	}
	doc, err := json.Marshal(m)
	if err != nil {
		return desc, err
	}
	desc = ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(doc), Size: int64(len(doc))}
	s.made[desc.Digest] = doc
	return desc, nil
}

// dockerLayer describes a layer. It is a tar file, whose digest is the diffID,
// or in spite of its name a compressed one, as docker load accepts it.
func (s *fileSource) dockerLayer(name string, diffID digest.Digest) (desc ocispec.Descriptor, err error) {
	if err := diffID.Validate(); err != nil {
		return desc, fmt.Errorf("diffID %.100q: %w: %w", diffID, err, errdefs.ErrInvalidArgument)
	}
	f, err := s.files.open(name)
	if err != nil {
		return desc, err
	}
	defer f.Close()
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffID, Size: f.Size()}
	head := make([]byte, 4)
	n, err := f.ReadAt(head, 0)
	if err != nil && n < len(head) && f.Size() >= int64(len(head)) {
		return desc, err
	}
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b\x08")):
		desc.MediaType = ocispec.MediaTypeImageLayerGzip
	case bytes.Equal(head, []byte("\x28\xb5\x2f\xfd")):
		desc.MediaType = ocispec.MediaTypeImageLayerZstd
	default:
		return desc, nil
	}
	desc.Digest, err = digest.FromReader(io.NewSectionReader(f, 0, f.Size()))
	return desc, err
}
