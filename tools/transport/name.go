package transport

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/tatami-containers/tatami/rootfs/image"
)

// Kind is a kind of place, as skopeo spells it.
type Kind string

// The kinds of places.
const (
	Registry      Kind = "docker"         // docker://REF, or the bare reference
	Layout        Kind = "oci"            // oci:DIR[:TAG]
	OCIArchive    Kind = "oci-archive"    // oci-archive:FILE[:TAG], a tar file of an OCI layout
	DockerArchive Kind = "docker-archive" // docker-archive:FILE[:REF], of docker save
)

// Name says where an image is.
type Name struct {
	Kind      Kind
	Reference reference.Named // of an image in a registry, else nil
	Path      string          // of a directory or file, else ""
	// Object is which of the images there: a tag or digest of a registry or
	// layout, a reference ("debian:12") of a docker archive. "" is the only one.
	Object string
}

// Parse parses a name in skopeo's spelling. A path ends at its first colon.
func Parse(s string) (Name, error) {
	for _, k := range []Kind{Layout, OCIArchive, DockerArchive} {
		rest, ok := strings.CutPrefix(s, string(k)+":")
		if !ok {
			continue
		}
		n := Name{Kind: k}
		n.Path, n.Object, _ = strings.Cut(rest, ":")
		if n.Path == "" {
			return Name{}, fmt.Errorf("parse image name %q: it has no path; write %s:PATH or %s:PATH:TAG: %w", s, k, k, errdefs.ErrInvalidArgument)
		}
		return n, nil
	}
	ref, err := image.ParseReference(strings.TrimPrefix(s, string(Registry)+"://"))
	if err != nil {
		return Name{}, err
	}
	return Name{Kind: Registry, Reference: ref, Object: image.Object(ref)}, nil
}

// String is a name that Parse understands, save for registries, whose images
// are called by their reference.
func (n Name) String() string {
	if n.Kind == Registry {
		return n.Reference.String()
	}
	s := string(n.Kind) + ":" + n.Path
	if n.Object != "" {
		s += ":" + n.Object
	}
	return s
}
