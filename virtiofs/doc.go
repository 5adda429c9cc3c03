// Package virtiofs is a virtio-fs device behind vhost-user. It shows a guest a flat,
// read-only [Directory] of image files, through which nothing of the node's file
// system can be reached, or a [Tree] of such directories and of host directories
// that package passthrough serves.
//
// The guest is hostile. A request is copied out of its memory before it is looked
// at, its opcode must be on a list, and only then does go-fuse take it apart. READ
// is answered here: bytes of a file that is open in this process ([Mapper]) go from
// the page cache to the guest's buffers by preadv, everything else through a private
// buffer. What a guest can make the device hold is bounded by Config.Requests and
// Config.ReplyBytes. No reply is ever read back out of guest memory.
//
// Node ids of images are given once and never used again, handles mean nothing, attributes
// never change, and the device counts no lookups. So FORGET has no effect, a FUSE
// session begins with any INIT (a remount, a guest that booted again), and a
// machine that was paused goes on with the session that it had. So does a process
// that takes over from another one, given the INIT and the ids (Config.Session,
// Directory.AddAs).
//
// Virtio-fs of Linux sends no INTERRUPT (fs/fuse/virtio_fs.c), and has no
// notifications: what a guest believes about a name it believes until it forgets.
//
// Layout and numbers: virtio 1.2, section 5.11, and include/uapi/linux/fuse.h.
//
// Requests for host directories ([Files]) may take as long as the node's file system
// does: they run beside, a bounded number for each subtree, so that a slow one holds
// up no other. A queue that is halted waits for those that run, which cannot be cut
// short. Their nodes are counted, and dropped with the session.
//
// Lock order: the locks here are leaves; nothing is called under them.
package virtiofs
