// Package mount turns images into container root filesystems: each image is
// one file of a FUSE session, EROFS is mounted on it (on the file itself, else
// on a loop device with direct I/O), and an overlay on that. One EROFS mount,
// the lower, is shared by all mounts of an image.
//
// The state directory holds the mount table. A record is written before the
// kernel mounts anything for it and removed after everything is unmounted, so
// that a new process knows all that exists:
//
//	session.json        the session the records belong to; the next node id
//	mounts/<id>.json    one mount
//	images/<node>.json  one image file and its lower
//	lower/<hex>         mount point of the lower of a manifest
//	upper/<id>          tmpfs with upper/ and work/, or a link to such a directory
//
// It should lie on a tmpfs: what it describes does not outlive the kernel.
//
// A lower that is unmounted may still be read, by processes that have files of
// a detached overlay open. So its image is served until the kernel closes the
// file (RELEASE); until then the record is "draining".
//
// An image that is a local file, as on virtio-fs, can be mounted from there: the
// lower is then on that file, the session has none of it, and this process is
// needed for nothing but the table.
//
// System calls that may read an image run on threads of their own: see thread.
//
// Lock order: the lock of a mount's ID, the lock of an image, Mounter.mu. The
// last one also orders writes of the table. Files are opened, closed and read
// without mu.
package mount
