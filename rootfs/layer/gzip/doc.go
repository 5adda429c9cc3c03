// Package gzip inflates gzip blobs (RFC 1951 and 1952) and can begin in their
// middle. While a blob is streamed the first time a Reader records checkpoints
// at DEFLATE block boundaries; later a Pool resumes at any of them and reads
// only the compressed bytes that a plain range needs.
//
// Which blobs are valid is decided as compress/gzip decides it, down to
// incomplete Huffman codes, header limits and trailing garbage, because that is
// what the runtimes that unpack layers use.
//
// A Reader belongs to one goroutine at a time; a Pool to any number.
package gzip
