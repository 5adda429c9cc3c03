// Package index holds what is known of an image before its bytes are there:
// the entries of its layers, the chunk tables of its segments, and where in
// the blobs a segment's bytes are found. It encodes and decodes them, checks
// every bound while decoding, and does no I/O of its own.
package index
