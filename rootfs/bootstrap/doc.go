// Package bootstrap makes the metadata of an image: it merges the entries of
// the layers into one tree and writes that tree as an EROFS filesystem whose
// file contents lie behind it, in the segments. It reads no file contents and
// does no I/O.
//
// # Merging
//
// The tree is what overlayfs shows when each layer has been unpacked into a
// directory of its own, the way containerd does it for its overlay snapshotter
// (pkg/archive: applyNaive, mkparent, hardlinkRootPath):
//
//   - Within a layer entries apply in their order and the last one wins. A
//     directory over a directory sets its attributes and keeps what is in it;
//     everything else replaces what was there.
//   - Whiteouts and opaque marks belong to a path of their layer and hide only
//     lower layers, wherever they stand among the entries. So a path with both
//     a whiteout and a directory is a directory without the lower content. A
//     character device 0:0 is overlayfs's own whiteout and hides like one, after
//     it has replaced what its layer had of the name.
//   - Symlinks in the parent part of an entry's path are followed when this
//     layer made them, within the root. A symlink of a lower layer is not
//     followed: the layer gets a directory of that name, which hides it.
//   - Missing parents become directories. They take owner, mode, times and
//     attributes from the directory that the lower layers have there, if need
//     be through their symlinks, else they are root's, mode 0755, of 1970.
//   - A parent that this layer made and that is no directory is an error.
//   - The target of a hard link is looked up in this layer and, where it has
//     nothing, in what the lower layers show. Both names then are one inode.
//     (containerd knows only targets in the layer; mounted trees and umoci
//     allow more.) The attributes of the link entry itself do not count. A
//     target that is missing or a directory is an error.
//   - The root has the attributes of the uppermost entry for it, else those of
//     a missing parent. An opaque mark on it hides all lower layers, as the
//     specification has it; overlayfs does not look for one there.
//
// # Attributes
//
// Extended attributes that Linux would not let an unpacker set are left out,
// as containerd leaves them out: trusted.* (among them the marks that overlayfs
// takes orders from), unknown namespaces, user.* on anything but files and
// directories, ACLs of symlinks, default ACLs of anything but directories.
// Symlinks always have mode 0777.
//
// # Hostile input
//
// Every entry is validated; the work done for symlinks, the number of names,
// the depth of the tree and the size of the result are bounded. Nothing
// recurses.
package bootstrap
