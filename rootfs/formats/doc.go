// Package formats finds out how the layers of an image can be read without
// fetching them whole. There may be several ways to one layer: a table of
// contents in its blob, an index artifact that was published with the image or
// beside it, an index of SOCI, the bootstrap of Nydus. What all of them lead to is
// an index.Layer. A layer without any has to be streamed once (layer.Build).
//
// Each way has a digest, By, of what it takes its word from. A way is as
// trustworthy as that digest: bound ways have it from the image's manifest or
// from the image index above it, the others from whoever may push to the
// repository.
package formats
