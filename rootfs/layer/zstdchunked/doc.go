// Package zstdchunked makes a layer out of a zstd:chunked blob without reading
// it: a zstd stream with frames for the chunks of its files, and behind them, in
// a frame that decoders skip, a table of contents (TOC).
//
// stargz-snapshotter and podman make such blobs, each in its own way; the
// manifest's annotations tell which. Its digest of the TOC is what makes the TOC
// trustworthy, and where it says where the TOC is the footer of the blob is not
// looked at. What the TOC says is checked as hostile all the same (package toc).
// As eStargz's, it replaces what the tar in the blob says: the tar-split data
// that podman adds, to make the tar again, is not read.
//
// The formats: stargz-snapshotter, estargz/zstdchunked; container-libs storage,
// pkg/chunked/internal/minimal/compression.go.
package zstdchunked
