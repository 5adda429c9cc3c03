// Package sharedimages is how a node's image files reach a virtual machine over
// virtio-fs: the names they have there, and the messages between tatami-virtiofsd
// and tatami-host.
package sharedimages

import (
	_ "crypto/sha256" // package digest takes only algorithms that the program has
	_ "crypto/sha512"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Dir is the directory of the image files where they share a file system with
// others.
const Dir = ".tatami"

const suffix = ".erofs"

// Name is the file name of the image with this manifest:
// "sha256-<hex>.erofs". The digest must be valid.
func Name(manifest digest.Digest) string {
	return manifest.Algorithm().String() + "-" + manifest.Encoded() + suffix
}

// Parse is the reverse of Name. What is no such name is ErrInvalidArgument.
func Parse(name string) (digest.Digest, error) {
	stem, ok := strings.CutSuffix(name, suffix)
	algorithm, hex, cut := strings.Cut(stem, "-")
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), hex)
	if !ok || !cut || d.Validate() != nil {
		return "", fmt.Errorf("%.80q is not the name of an image file: %w", name, errdefs.ErrInvalidArgument)
	}
	return d, nil
}
