// Package transport reads and writes images where users have them: in
// registries, OCI layout directories, and archives of docker save. A Source
// and a Dest hide which it is.
//
// A Source checks all that it gives out against digest and size, a Dest all
// that it takes; only ranges of a LayerBlob are left to whoever reads them.
// Manifests pass byte for byte. No blob is held in memory or unpacked.
//
// A Dest shows nothing half done: what was pushed counts when the manifest
// above it was pushed.
package transport
