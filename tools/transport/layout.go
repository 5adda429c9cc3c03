package transport

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// containerdName is containerd's annotation for the full name of an image in
// the index of a layout, beside OCI's for the tag (containerd,
// core/images/annotations.go).
const containerdName = "io.containerd.image.name"

func openLayout(n Name) (*fileSource, error) {
	root, err := os.OpenRoot(n.Path)
	if os.IsNotExist(err) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return newLayoutSource(directory{root}, n.Object)
}

// newLayoutSource takes over f, which has an OCI layout (image-spec,
// image-layout.md), also when it fails.
func newLayoutSource(f files, object string) (*fileSource, error) {
	s := &fileSource{files: f, object: object}
	index, err := readIndex(f)
	if err != nil {
		_ = f.Close() // nothing was written
		return nil, err
	}
	for _, d := range index.Manifests {
		r := root{Descriptor: d}
		for _, key := range []string{ocispec.AnnotationRefName, containerdName} {
			if name := d.Annotations[key]; name != "" {
				r.names = append(r.names, name)
			}
		}
		s.roots = append(s.roots, r)
	}
	return s, nil
}

// readIndex reads the list of images after the file that marks a layout.
func readIndex(f files) (ocispec.Index, error) {
	var index ocispec.Index
	var mark ocispec.ImageLayout
	if err := readJSON(f, ocispec.ImageLayoutFile, &mark); err != nil {
		return index, fmt.Errorf("this is no OCI layout: %w", err)
	}
	if mark.Version != ocispec.ImageLayoutVersion {
		return index, fmt.Errorf("OCI layout of version %.32q; only %s is known: %w", mark.Version, ocispec.ImageLayoutVersion, errdefs.ErrInvalidArgument)
	}
	return index, readJSON(f, ocispec.ImageIndexFile, &index)
}

func readJSON(f files, name string, doc any) error {
	data, err := readFile(f, name, registry.MaxManifest)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, doc); err != nil {
		return fmt.Errorf("decode %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return nil
}
