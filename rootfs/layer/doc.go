// Package layer makes lazily readable layers out of blobs.
//
// Build streams a blob once, verifies it, and learns all that later reads need:
// entries, the chunk table, and where in the blob the bytes are. A Reader then
// produces any range of the layer's segment from ranges of the blob. Package
// estargz gets the same from a blob's own table of contents.
//
// Nothing here keeps data or verifies chunks: the store does.
package layer
