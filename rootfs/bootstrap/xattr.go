package bootstrap

import (
	"encoding/binary"
	"math"
	"strings"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Numbers of attribute namespaces on disk (fs/erofs/erofs_fs.h).
const (
	xattrUser       = 1
	xattrACLAccess  = 2
	xattrACLDefault = 3
	xattrSecurity   = 6
)

const (
	xattrHead  = 12 // bytes before an inode's attributes
	xattrFixed = 4  // bytes before the name of each
	// maxXattrs is what the 16-bit count in the inode can tell, in bytes.
	maxXattrs = xattrHead + 4*(math.MaxUint16-1)
)

// space says in which namespace an attribute is kept and under what name. It
// is false for attributes that do not belong on the entry, see the package
// comment.
func space(e *index.Entry, name string) (number uint8, rest string, ok bool) {
	if rest, ok = strings.CutPrefix(name, "security."); ok {
		return xattrSecurity, rest, rest != ""
	}
	if rest, ok = strings.CutPrefix(name, "user."); ok {
		return xattrUser, rest, rest != "" && (e.Kind == index.File || e.Kind == index.Dir)
	}
	switch name {
	case "system.posix_acl_access":
		return xattrACLAccess, "", e.Kind != index.Symlink
	case "system.posix_acl_default":
		return xattrACLDefault, "", e.Kind == index.Dir
	}
	return 0, "", false
}

// xattrSize is the space that the attributes of an entry take behind its
// inode, in bytes; 0 if there are none.
func xattrSize(e *index.Entry) (int64, error) {
	size := int64(0)
	for _, x := range e.Xattrs {
		number, rest, ok := space(e, x.Name)
		if !ok {
			continue
		}
		if len(x.Value) > math.MaxUint16 {
			return 0, invalid("extended attribute %q has %d bytes, EROFS holds %d", x.Name, len(x.Value), math.MaxUint16)
		}
		if (number == xattrACLAccess || number == xattrACLDefault) && !soundACL(x.Value) {
			return 0, invalid("extended attribute %q is not an ACL", x.Name)
		}
		size += xattrLen(rest, x.Value)
	}
	if size == 0 {
		return 0, nil
	}
	if size += xattrHead; size > maxXattrs {
		return 0, invalid("extended attributes take %d bytes, EROFS holds %d", size, maxXattrs)
	}
	return size, nil
}

func xattrLen(name, value string) int64 {
	return int64(xattrFixed+len(name)+len(value)+3) &^ 3
}

// soundACL checks the frame of an ACL as the kernel's posix_acl_from_xattr
// does; with a broken one the file could not be opened at all.
func soundACL(v string) bool {
	const head, element, version = 4, 8, 2
	return len(v) >= head && (len(v)-head)%element == 0 && binary.LittleEndian.Uint32([]byte(v[:head])) == version
}

// putXattrs writes the attributes to b, which is zero and long enough.
func putXattrs(b []byte, e *index.Entry) {
	at := int64(xattrHead) // the head is zero: no filter, nothing shared
	for _, x := range e.Xattrs {
		number, rest, ok := space(e, x.Name)
		if !ok {
			continue
		}
		p := b[at:]
		p[0], p[1] = uint8(len(rest)), number
		binary.LittleEndian.PutUint16(p[2:], uint16(len(x.Value)))
		copy(p[xattrFixed:], rest)
		copy(p[xattrFixed+len(rest):], x.Value)
		at += xattrLen(rest, x.Value)
	}
}
