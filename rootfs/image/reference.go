package image

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// ParseReference parses s as docker does: "debian" is
// docker.io/library/debian:latest, "localhost:5000/x" a registry's own. With a
// tag and a digest, the digest counts and the tag is dropped. The result has
// one of both.
func ParseReference(s string) (reference.Named, error) {
	ref, err := reference.ParseDockerRef(s)
	if err != nil {
		return nil, fmt.Errorf("parse image reference %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return ref, nil
}

// Object is the tag or digest of ref, as a registry is asked for it; a ref
// with neither means the tag "latest".
func Object(ref reference.Named) string {
	if d, ok := ref.(reference.Digested); ok {
		return d.Digest().String()
	}
	if t, ok := ref.(reference.Tagged); ok {
		return t.Tag()
	}
	return "latest"
}
