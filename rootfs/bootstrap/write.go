package bootstrap

import (
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Numbers of the EROFS disk format (fs/erofs/erofs_fs.h of Linux 6.1). No
// incompatible feature is used, so kernels since 5.4 read it.
const (
	superMagic       = 0xe0f5e1e2
	compatChecksum   = 1
	compatMtime      = 2
	blockBits        = 12
	formatExtended   = 1 // bit 0 of an inode's format
	layoutPlain      = 0 // bits 1 to 3: data in whole blocks
	layoutInline     = 2 // data behind the inode
	typeShift        = 12
	typeFifo         = 1
	typeChar         = 2
	typeDir          = 4
	typeBlock        = 6
	typeFile         = 8
	typeSymlink      = 10
	symlinkMode      = 0o777
	superUUID        = 48 // offset in the superblock
	superChecksumOff = 4
)

// fileType is the type's number in st_mode and, in the same order, in a
// directory entry.
func fileType(k index.Kind) (mode uint16, dirent uint8) {
	switch k {
	case index.Dir:
		return typeDir, 2
	case index.Symlink:
		return typeSymlink, 7
	case index.Char:
		return typeChar, 3
	case index.Block:
		return typeBlock, 4
	case index.Fifo:
		return typeFifo, 5
	}
	return typeFile, 1
}

// write makes the bootstrap of an image whose segments are placed; places has
// the offset in the image of each layer's segment.
func (p *plan) write(places []int64, img *index.Image) []byte {
	b := make([]byte, p.size)
	for n := range p.inodes {
		if i := &p.inodes[n]; i.nid != 0 {
			p.putInode(b, uint32(n), i, places)
		}
	}
	total := p.size
	if n := len(img.Segments); n > 0 {
		total = img.Segments[n-1].End()
	}
	p.putSuper(b[superOff:], total)
	sign(b, img)
	return b
}

func (p *plan) putInode(b []byte, number uint32, i *inode, places []int64) {
	e := i.entry
	xattrs, _ := xattrSize(e) // checked when the inode was placed
	size, layout, where := p.content(i, xattrs, places)
	kind, _ := fileType(e.Kind)
	mode := e.Mode
	if e.Kind == index.Symlink {
		mode = symlinkMode
	}
	d := b[int64(i.nid)*slotSize:]
	le := binary.LittleEndian
	le.PutUint16(d[0:], layout<<1|formatExtended)
	if xattrs > 0 {
		le.PutUint16(d[2:], uint16((xattrs-xattrHead)/4+1))
		putXattrs(d[inodeSize:], e)
	}
	le.PutUint16(d[4:], kind<<typeShift|mode)
	le.PutUint64(d[8:], uint64(size))
	le.PutUint32(d[16:], where)
	le.PutUint32(d[20:], number) // st_ino where that has 32 bits
	le.PutUint32(d[24:], e.UID)
	le.PutUint32(d[28:], e.GID)
	le.PutUint64(d[32:], uint64(e.Sec))
	le.PutUint32(d[40:], e.Nsec)
	le.PutUint32(d[44:], i.nlink)
	switch e.Kind {
	case index.Dir:
		p.putDir(p.room(b, i, xattrs), &p.dirs[i.dir])
	case index.Symlink:
		copy(p.room(b, i, xattrs), e.Link)
	}
}

// content says how long an inode's data are in bytes, how they are kept, and
// where they start: a block, or the number of a device.
func (p *plan) content(i *inode, xattrs int64, places []int64) (size int64, layout uint16, where uint32) {
	e := i.entry
	switch e.Kind {
	case index.Dir, index.Symlink:
		size = p.tail(i)
		if inline(xattrs, size) {
			return size, layoutInline, 0
		}
		return size, layoutPlain, p.data + i.block
	case index.Char, index.Block:
		// The kernel's new_encode_dev.
		return 0, layoutPlain, e.Minor&0xff | e.Major<<8 | (e.Minor&^0xff)<<12
	case index.File:
		if e.Size > 0 {
			where = uint32((places[i.layer] + e.Off) / blockSize)
		}
		return e.Size, layoutPlain, where
	}
	return 0, layoutPlain, 0
}

// room is where the entries of a directory or the target of a symlink go.
func (p *plan) room(b []byte, i *inode, xattrs int64) []byte {
	at := int64(p.data+i.block) * blockSize
	if inline(xattrs, p.tail(i)) {
		at = int64(i.nid)*slotSize + inodeSize + xattrs
	}
	return b[at:]
}

// putDir writes a directory: in each block the fixed parts of some entries,
// then their names.
func (p *plan) putDir(b []byte, d *directory) {
	le := binary.LittleEndian
	for rest := p.dirents(d); ; b = b[blockSize:] {
		n, _ := fill(rest)
		at := n * direntSize
		for k, e := range rest[:n] {
			i := &p.inodes[e.inode]
			_, kind := fileType(i.entry.Kind)
			f := b[k*direntSize:]
			le.PutUint64(f[0:], uint64(i.nid))
			le.PutUint16(f[8:], uint16(at))
			f[10] = kind
			at += copy(b[at:], e.name)
		}
		if rest = rest[n:]; len(rest) == 0 {
			return
		}
	}
}

// putSuper writes the superblock of an image of total bytes. Slot 0 is the
// start of the image: metadata blocks are counted from there.
func (p *plan) putSuper(s []byte, total int64) {
	le := binary.LittleEndian
	le.PutUint32(s[0:], superMagic)
	le.PutUint32(s[8:], compatChecksum|compatMtime)
	s[12] = blockBits
	le.PutUint16(s[14:], uint16(p.inodes[p.nodes[p.root].inode].nid))
	le.PutUint64(s[16:], p.count)
	le.PutUint32(s[36:], uint32(total/blockSize))
}

// sign gives the image an UUID made from everything it consists of, and the
// superblock its checksum.
func sign(b []byte, img *index.Image) {
	h := sha256.New()
	h.Write([]byte(img.Manifest))
	for _, s := range img.Segments {
		h.Write([]byte(s.ID))
	}
	h.Write(b)
	uuid := h.Sum(nil)[:16]
	uuid[6] = uuid[6]&0x0f | 0x80 // RFC 9562, version 8: made in a way of one's own
	uuid[8] = uuid[8]&0x3f | 0x80
	copy(b[superOff+superUUID:], uuid)
	// CRC-32C of the rest of the first block without the final inversion, as
	// the kernel's crc32c(~0, …) computes it.
	sum := ^crc32.Checksum(b[superOff:blockSize], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(b[superOff+superChecksumOff:], sum)
}
