// Package imagefs answers a FUSE session: a flat, read-only filesystem with
// one file for each image. It keeps no state that the kernel does not hold:
// node ids are given by the caller and never reused, file handles mean
// nothing, attributes never change. So another process can go on serving the
// same session at any time.
//
// Data bypasses the page cache of the files (FOPEN_DIRECT_IO): what is mounted
// on them caches it, once.
//
// A file is opened by the kernel once, while it is being mounted; Seal refuses
// every later open. So the kernel's RELEASE of it says that nothing reads it
// any more.
//
// Lock order: the locks here (Server.mu, buffers.mu, complaints.mu) are
// leaves; no two are held at once and nothing is called under them.
package imagefs
