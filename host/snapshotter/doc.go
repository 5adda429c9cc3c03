// Package snapshotter is containerd's snapshotter of the node: containerd's
// snapshot API with metadata in a bbolt file, the remote-snapshot protocol, and
// for each container the mounts that Kata's runtimes or runc expect.
//
// A layer of an image that the node serves lazily is only a metadata record,
// which names a Chain. Other layers are directories, as with containerd's
// overlayfs snapshotter. A snapshot of a container has a directory too, and is a
// holder of what it needs of the node (Images).
//
// Nothing that a client sends becomes part of a path: directories have the name
// of a number that the metadata gives out, holders that of a random word.
//
// Order of the steps: what a snapshot needs is made before its record, in a
// directory with a temporary name, and goes away after its record. So after a
// crash there may be directories, holders and marks of owned images without a
// record, never the reverse; Open and Cleanup remove those. No transaction of
// the metadata is open while the node is asked for something.
package snapshotter
