// Package soci reads images through the SOCI indexes that others made for them:
// a gzip or plain tar layer stays as it is, and beside it lies a ztoc, which
// says what files it has, where inflating can start, and what SHA-256 each
// compressed span of it has. Open makes a layer of a ztoc, Find finds the ztocs
// of an image in its registry.
//
// A ztoc has no digests of plain bytes. Its layers have tables of the algorithm
// index.Vouched: whoever reads the blob checks the spans before inflating.
//
// The facts about the format are those of soci-snapshotter: ztoc/fbs/ztoc.fbs,
// ztoc/compression (gzip_zinfo.c, tar_zinfo.go), soci/soci_index.go and
// docs/soci-index-manifest-v2.md.
package soci
