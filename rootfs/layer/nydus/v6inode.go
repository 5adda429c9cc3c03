package nydus

import (
	"bytes"
	"fmt"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Layouts of an inode's data.
const (
	v6Plain  = 0 // in blocks
	v6Inline = 2 // in blocks, the last bytes behind the inode
	v6Chunks = 4
)

// Sizes in bytes.
const (
	v6Slot        = 32 // inodes are numbered by these
	v6Compact     = 32
	v6Extended    = 64
	v6XattrHeader = 12
	v6Dirent      = 12
)

// inode implements format.
func (v *v6) inode(number uint64) (*inode, error) {
	if number > uint64(len(v.file)) || v.meta > uint64(len(v.file)) {
		return nil, invalid("inode %d is not in the bootstrap", number)
	}
	off := v.meta + number*v6Slot
	b, err := v.file.at(off, v6Compact)
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", number, err)
	}
	i := &inode{key: number, union: le.Uint32(b[16:])}
	format := le.Uint16(b)
	if i.body = v6Compact; format&1 != 0 {
		i.body = v6Extended
	}
	if b, err = v.file.at(off, i.body); err != nil {
		return nil, fmt.Errorf("inode %d: %w", number, err)
	}
	i.raw = v.file[off:]
	if err := v.attributes(i, b); err != nil {
		return nil, fmt.Errorf("inode %d: %w", number, err)
	}
	return i, v.data(i, format)
}

// attributes reads what an inode says of itself. The small form has 16-bit
// owners and no time.
func (v *v6) attributes(i *inode, b []byte) (err error) {
	e, mode := &i.entry, le.Uint16(b[4:])
	if e.Kind, err = kindOf(uint32(mode)); err != nil {
		return err
	}
	e.Mode, e.Sec, e.Nsec = mode&0o7777, v.built, v.builtNs
	if len(b) == v6Compact {
		i.links, e.Size = uint32(le.Uint16(b[6:])), int64(le.Uint32(b[8:]))
		e.UID, e.GID = v.flags.owner(uint32(le.Uint16(b[24:])), uint32(le.Uint16(b[26:])))
	} else {
		i.links, e.Size = le.Uint32(b[44:]), int64(le.Uint64(b[8:]))
		e.UID, e.GID = v.flags.owner(le.Uint32(b[24:]), le.Uint32(b[28:]))
		e.Sec, e.Nsec = int64(le.Uint64(b[32:])), le.Uint32(b[40:])
	}
	if e.Size < 0 {
		return invalid("size of %d bytes", uint64(e.Size))
	}
	setDevice(e, i.union)
	return i.readXattrs(le.Uint16(b[2:]))
}

// readXattrs reads the attributes behind the inode: n is 0 or the number of
// 4-byte units behind their header, plus 1.
func (i *inode) readXattrs(n uint16) error {
	if n == 0 {
		return nil
	}
	b, err := i.raw.at(i.body, v6XattrHeader+(uint64(n)-1)*4)
	if err != nil {
		return err
	}
	i.body += uint64(len(b))
	if b[4] != 0 {
		return invalid("shared extended attributes, which RAFS does not have")
	}
	for b = b[v6XattrHeader:]; len(b) > 0; {
		x, size, err := parseV6Xattr(b)
		if err != nil {
			return err
		}
		i.entry.Xattrs = append(i.entry.Xattrs, x)
		b = b[min(len(b), (size+3)&^3):]
	}
	index.SortXattrs(i.entry.Xattrs)
	return nil
}

// parseV6Xattr reads the attribute that b begins with: length of the name,
// number of its prefix, length of the value, name, value.
func parseV6Xattr(b []byte) (x index.Xattr, size int, err error) {
	if len(b) < 4 {
		return x, 0, invalid("extended attribute ends too early")
	}
	prefix, ok := v6Prefixes[b[1]]
	if !ok {
		return x, 0, invalid("extended attribute with unknown prefix %d", b[1])
	}
	name := 4 + int(b[0])
	size = name + int(le.Uint16(b[2:]))
	if size > len(b) {
		return x, 0, invalid("extended attribute ends too early")
	}
	return index.Xattr{Name: prefix + string(b[4:name]), Value: string(b[name:size])}, size, nil
}

// v6Prefixes are what names of attributes begin with.
var v6Prefixes = map[byte]string{
	1: "user.",
	2: "system.posix_acl_access",
	3: "system.posix_acl_default",
	4: "trusted.",
	6: "security.",
}

// data checks how the data of an inode is kept and reads the target of a
// symlink.
func (v *v6) data(i *inode, format uint16) error {
	layout := format >> 1 & 7
	i.inner = layout == v6Inline
	e := &i.entry
	switch {
	case format>>4 != 0:
		return invalid("unknown bits %#x in the format of an inode", format)
	case e.Kind == index.File && e.Size > 0 && layout != v6Chunks,
		(e.Kind == index.Dir || e.Kind == index.Symlink) && layout != v6Plain && layout != v6Inline:
		return invalid("layout %d of the data", layout)
	case e.Kind == index.Symlink:
		if e.Size > index.MaxPath {
			return invalid("target of %d bytes is over %d", e.Size, index.MaxPath)
		}
		b, err := v.block(i, 0)
		if err != nil {
			return fmt.Errorf("target: %w", err)
		}
		e.Link, e.Size = string(b), 0
	case e.Kind != index.File && e.Kind != index.Dir:
		e.Size = 0
	}
	return nil
}

// block returns block n of the data of a directory or symlink; the last one is
// shorter.
func (v *v6) block(i *inode, n uint64) ([]byte, error) {
	size, off := uint64(i.entry.Size), n<<v6BlockBits
	length := min(size-off, 1<<v6BlockBits)
	if i.inner && length < 1<<v6BlockBits {
		return i.raw.at(i.body, length)
	}
	return v.file.at((uint64(i.union)+n)<<v6BlockBits, length)
}

// list implements format.
func (v *v6) list(d *inode) (children, error) {
	size := d.entry.Size
	d.entry.Size = 0
	if size > int64(len(v.file)) {
		return nil, invalid("directory of %d bytes in a bootstrap of %d", size, len(v.file))
	}
	i := *d
	i.entry.Size = size
	return &v6Names{v: v, dir: &i}, nil
}

// v6Names reads a directory: blocks, each with entries of a number, the
// offset of the name in the block and a type, behind them the names.
type v6Names struct {
	v     *v6
	dir   *inode
	block uint64 // next
	open  []byte // the block that is read
	count int    // entries in it
	i     int    // next
	last  string
}

func (n *v6Names) next() (string, uint64, bool, error) {
	for {
		if n.i == n.count {
			if n.block<<v6BlockBits >= uint64(n.dir.entry.Size) {
				return "", 0, false, nil
			}
			if err := n.advance(); err != nil {
				return "", 0, false, err
			}
		}
		name, number, err := n.entry()
		if err != nil {
			return "", 0, false, err
		}
		if name <= n.last {
			return "", 0, false, invalid("name %.255q is not in order", name)
		}
		if n.last = name; name != "." && name != ".." {
			return name, number, true, nil
		}
	}
}

// advance opens the next block.
func (n *v6Names) advance() error {
	b, err := n.v.block(n.dir, n.block)
	if err != nil {
		return err
	}
	n.block++
	if len(b) < v6Dirent {
		return invalid("block of %d bytes", len(b))
	}
	first := int(le.Uint16(b[8:]))
	if first < v6Dirent || first%v6Dirent != 0 || first > len(b) {
		return invalid("first name at %d in a block of %d", first, len(b))
	}
	n.open, n.count, n.i = b, first/v6Dirent, 0
	return nil
}

// entry reads an entry. A name ends where the next one begins; the last with
// the block or a zero byte.
func (n *v6Names) entry() (string, uint64, error) {
	b := n.open[n.i*v6Dirent:]
	start, end := int(le.Uint16(b[8:])), len(n.open)
	n.i++
	if n.i < n.count {
		end = int(le.Uint16(b[v6Dirent+8:]))
	}
	if start > end || end > len(n.open) {
		return "", 0, invalid("name from %d to %d in a block of %d", start, end, len(n.open))
	}
	name := n.open[start:end]
	if n.i == n.count {
		if zero := bytes.IndexByte(name, 0); zero >= 0 {
			name = name[:zero]
		}
	}
	return string(name), le.Uint64(b), nil
}
