package index

import "slices"

// BlockSize is the block size of every image in bytes: bootstraps, file starts
// in a segment and segment sizes are multiples of it.
const BlockSize = 4096

// Kind says what an Entry is.
type Kind uint8

// Kinds of entries. Whiteout and Opaque exist only in a layer, never in a
// merged image.
const (
	File     Kind = iota + 1
	Dir           // attributes of a directory
	Symlink       // Link is the target, verbatim
	Hardlink      // Link is the Path of another name, in this layer or a lower one
	Char          // Major, Minor
	Block         // Major, Minor
	Fifo          // named pipe
	Whiteout      // hides Path of the lower layers
	Opaque        // hides everything below the directory Path of the lower layers
)

// Entry is one name that a layer adds, changes or hides.
type Entry struct {
	// Path is slash-separated, clean and relative: "usr/bin/env". The root
	// directory is "". It is never absolute and has no ".." element.
	Path string
	Kind Kind
	// Mode holds the permission, set-id and sticky bits (0o7777), not the type.
	Mode     uint16
	UID, GID uint32
	// Sec and Nsec are the modification time since 1970, Nsec in [0, 1e9).
	Sec  int64
	Nsec uint32
	// Size is the content length of a File in bytes.
	Size int64
	// Off is where a File's content starts in the layer's segment: a multiple
	// of BlockSize; 0 when Size is 0.
	Off          int64
	Link         string
	Major, Minor uint32
	// Xattrs are sorted by name, names in full ("security.capability").
	// POSIX ACLs appear as system.posix_acl_access and …_default in the
	// kernel's binary form.
	Xattrs []Xattr
}

// Xattr is one extended attribute.
type Xattr struct {
	Name  string
	Value string
}

// Layout gives the files of one layer their places in its segment: in the
// order of the calls, each starting on a block boundary. The zero value is an
// empty segment.
type Layout struct{ end int64 }

// Place returns the offset of the next file, n bytes long.
func (l *Layout) Place(n int64) int64 {
	if n == 0 {
		return 0
	}
	off := l.end
	l.end += RoundUp(n)
	return off
}

// Size is the segment's size so far in bytes, a multiple of BlockSize.
func (l *Layout) Size() int64 { return l.end }

// RoundUp rounds n bytes up to whole blocks.
func RoundUp(n int64) int64 { return (n + BlockSize - 1) &^ (BlockSize - 1) }

// SortXattrs puts attributes in the order that Entry asks for.
func SortXattrs(x []Xattr) {
	slices.SortFunc(x, func(a, b Xattr) int {
		if a.Name < b.Name {
			return -1
		}
		if a.Name > b.Name {
			return 1
		}
		return 0
	})
}
