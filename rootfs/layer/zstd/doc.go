// Package zstd reads zstd blobs (RFC 8878) frame by frame. While a blob is
// streamed the first time a Reader records where its frames begin; later a Pool
// resumes at any of them. Inside of a frame nobody can begin: how lazily a blob
// can be read is decided by how many frames it has. One frame is usual; pzstd
// and the seekable format make many. Skippable frames, such as the seek table
// of that format, are passed over.
//
// Frames are found here, by their headers and those of their blocks, and
// decoded by klauspost/compress.
//
// A Reader belongs to one goroutine at a time; a Pool to any number.
package zstd
