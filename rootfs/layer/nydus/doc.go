// Package nydus makes a layer out of a Nydus image.
//
// A Nydus image (RAFS v5 or v6) has one small layer with a bootstrap, which holds
// the merged tree of the whole image and the digest of every chunk of every
// file, and layers with the chunks' data. Open reads the bootstrap, checks it
// against the digest that the manifest has of it, and returns one index.Layer
// for the whole image: the files in the order of the tree, each with its
// chunks, each of those with its place in one of the data layers.
//
// Only the bootstrap is trusted. Where chunks share compressed data (batches,
// and contexts for reading gzip layers in OCI reference images) a table in the
// data layer says where they are; it is checked against a digest where the
// bootstrap has one, and if it lies the chunks do not have their digests.
//
// Not supported, with an error that says so: encrypted blobs, tarfs mode (which
// has no digests of chunks), data outside the registry. Sockets are left out.
//
// Formats: nydus, rafs/src/metadata/layout/v5.rs and v6.rs, storage/src/meta, and
// Linux, fs/erofs/erofs_fs.h. Everything is tested with images that nydus-image
// made (testdata/README.md) but for these, which no option of it produces from a
// tar or a directory and of which tests make the bytes: holes, gzip as the
// compressor of chunks, bootstraps without owners.
package nydus
