package nydus

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/layer"
)

// BlobMediaType is the media type of layers that hold the data of a Nydus
// image (nydus-snapshotter, pkg/converter/constant.go).
const BlobMediaType = "application/vnd.oci.image.layer.nydus.blob.v1"

// Annotations of layers in a manifest (nydus-snapshotter, pkg/label/label.go and
// pkg/converter/constant.go). The first two say what a layer is by being there;
// RefAnnotation of a data layer names the ordinary gzip layer that its bytes are
// in (an OCI reference image).
const (
	BootstrapAnnotation = "containerd.io/snapshot/nydus-bootstrap"
	BlobAnnotation      = "containerd.io/snapshot/nydus-blob"
	RefAnnotation       = "containerd.io/snapshot/nydus-ref"
	encryptedAnnotation = "containerd.io/snapshot/nydus-encrypted-blob"
)

// IsBootstrap tells whether a layer holds the bootstrap of a Nydus image.
func IsBootstrap(desc layer.Descriptor) bool {
	_, ok := desc.Annotations[BootstrapAnnotation]
	return ok
}

// isBlob tells whether a layer holds data of a Nydus image.
func isBlob(desc layer.Descriptor) bool {
	_, ok := desc.Annotations[BlobAnnotation]
	return ok || desc.MediaType == BlobMediaType
}

// Detect tells whether the layers of a manifest are a Nydus image: one
// bootstrap, and any number of layers with data. It returns both. Other layers
// may stand beside them; their content is in the bootstrap too.
func Detect(layers []layer.Descriptor) (bootstrap layer.Descriptor, blobs []layer.Descriptor, ok bool) {
	for _, desc := range layers {
		switch {
		case IsBootstrap(desc):
			bootstrap, ok = desc, true
		case isBlob(desc):
			blobs = append(blobs, desc)
		}
	}
	return bootstrap, blobs, ok
}

// checkPlain refuses layers that the manifest calls encrypted.
func checkPlain(layers []layer.Descriptor) error {
	for _, desc := range layers {
		if _, ok := desc.Annotations[encryptedAnnotation]; ok {
			return errEncrypted(desc.Digest.String())
		}
	}
	return nil
}

func errEncrypted(blob string) error {
	return invalid("blob %s is encrypted, and encrypted Nydus blobs are not supported; convert the image without encryption", blob)
}

// invalid makes an error for content that is wrong or not supported.
func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
