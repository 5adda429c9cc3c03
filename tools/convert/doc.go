// Package convert turns the tar of a layer into a blob that can be read lazily
// and still is an ordinary tar.gz or tar.zst for every runtime.
//
// # Dialects
//
// EStargz is stargz-snapshotter's format (its docs/estargz.md). The plain tar is
// the source's, byte by byte, with a landmark added and the table of contents
// (TOC) as its last file; so the diffID changes.
//
// ZstdChunked is podman's format (containers/storage, pkg/chunked). Without a
// profile the plain tar is exactly the source's and so is the diffID: the TOC,
// the tar-split data (from which podman makes the tar again, to check the
// diffID) and the footer are skippable frames.
//
// ZstdStargz is stargz-snapshotter's way to use zstd (its package
// estargz/zstdchunked).
//
// One blob cannot serve both zstd dialects: stargz-snapshotter finds the TOC by
// the last eight bytes of the blob, which the two define differently, and wants
// its annotation of the TOC's digest, which makes podman refuse a layer that has
// podman's too ("both zstd:chunked and eStargz TOC found").
//
// # How
//
// The tar is read once. Its bytes are cut into members (gzip members or zstd
// frames): each begins with a file's chunk and ends with the headers before the
// next one. Members are compressed by several goroutines and written in order,
// so that the blob does not depend on how many there are. Memory is bounded by
// a few members for each goroutine, and by the TOC.
package convert
