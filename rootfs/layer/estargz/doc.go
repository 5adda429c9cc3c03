// Package estargz makes a layer out of an eStargz blob without reading it: the
// blob ends with a table of contents (TOC) that lists its files and the digests
// of their chunks, each in a gzip member of its own or with neighbours. Some
// converters leave the blob as it is and put the TOC into another image.
//
// Only the digest of the TOC, which the manifest carries, makes it trustworthy;
// the footer merely says where to look. What the TOC says is checked as hostile
// all the same (package toc).
//
// The format: stargz-snapshotter, docs/estargz.md.
package estargz
