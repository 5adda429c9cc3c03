// Package toc makes a layer out of a table of contents (TOC): the JSON that
// eStargz and zstd:chunked blobs carry, with an entry for each name of the
// layer and each further chunk of a file. Packages estargz and zstdchunked know
// where it is in a blob and whether it is the right one.
//
// There are three dialects, which one parser reads, as none gives another
// meaning to a field that it does not have:
//
//   - eStargz and stargz's zstd:chunked cut files at fixed distances. A chunk is
//     in a gzip member or zstd frame alone or behind others (innerOffset), and
//     the member ends where the next one begins. Times are whole seconds.
//   - podman's zstd:chunked cuts files by content. Each chunk is a frame of its
//     own, the last of a file ends at the file's endOffset, and runs of zeros are
//     chunks of chunkType "zeros". Times have nanoseconds.
//
// Names that are not UTF-8 come mangled from all of them: JSON cannot hold them.
//
// The formats: stargz-snapshotter, docs/estargz.md; container-libs storage,
// pkg/chunked/internal/minimal/compression.go.
package toc
