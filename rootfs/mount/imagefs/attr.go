package imagefs

import (
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// forever is how long the kernel may believe names and attributes: no file
// changes, and no name or node id is used twice.
const forever = 365 * 24 * time.Hour

const blockSize = 4096

// FillEntry answers the look-up of a file of size bytes.
func FillEntry(out *fuse.EntryOut, node uint64, size int64) {
	out.NodeId = node
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	out.Attr = attr(node, size)
}

// FillFile describes a file of size bytes.
func FillFile(out *fuse.AttrOut, node uint64, size int64) {
	out.SetTimeout(forever)
	out.Attr = attr(node, size)
}

// FillRoot describes the directory of the files.
func FillRoot(out *fuse.AttrOut) {
	out.SetTimeout(forever)
	out.Attr = fuse.Attr{Ino: fuse.FUSE_ROOT_ID, Mode: syscall.S_IFDIR | 0o555, Nlink: 2, Blksize: blockSize}
}

// FillStatFs describes the file system.
func FillStatFs(out *fuse.StatfsOut) {
	out.Bsize, out.Frsize, out.NameLen = blockSize, blockSize, 255
}

func attr(node uint64, size int64) fuse.Attr {
	return fuse.Attr{
		Ino: node, Mode: syscall.S_IFREG | 0o444, Nlink: 1,
		Size: uint64(size), Blocks: uint64(size+511) / 512, Blksize: blockSize,
	}
}
