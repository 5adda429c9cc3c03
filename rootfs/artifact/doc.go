// Package artifact is how the index of an image travels in a registry: as an
// OCI manifest with an artifact type whose subject is the image's manifest
// (image-spec, "Guidelines for Artifact Usage").
//
// A publisher's artifact has one layer file (package index) for each distinct
// layer of the image, annotated with the layer that it is of; layers without
// random access have none. It needs no bootstrap: that follows from the layer
// files. The same layers give the same artifact, byte for byte, on any machine.
//
// It is found in one of two ways:
//
//   - bound: the image index that the image was chosen from lists it, with the
//     annotation that names the image's manifest. Whoever has the digest of that
//     index, or a signature over it, has the artifact, too; copying the index
//     copies it. Its platform is "unknown/unknown", which runtimes pass over.
//   - as a referrer: the registry lists it for the manifest. Anyone who may push
//     to the repository can have made it.
package artifact
