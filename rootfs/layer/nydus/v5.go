package nydus

import (
	"bytes"
	"fmt"
	"math/bits"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// RAFS v5 (nydus, rafs/src/metadata/layout/v5.rs). Sizes in bytes.
const (
	v5Magic     = 0x5241_4653
	v5Version   = 0x500
	v5SuperSize = 8192
	v5BlobExt   = 64 // of an entry of the extended blob table
	v5Inode     = 128
)

// Flags of an inode. Another one says that it has several names, as its number
// of links does, and is not always set.
const (
	v5Symlink = 0x1
	v5Xattr   = 0x4
	v5Hole    = 0x8
	v5Known   = 0xf
)

// v5 is a bootstrap of version 5.
type v5 struct {
	file     content
	flags    flags
	inodes   content // offset of each inode in units of 8 bytes
	blobList []*blob
	listed   []uint64
}

func parseV5(c content) (*v5, error) {
	b, err := c.at(0, v5SuperSize)
	if err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	chunk := le.Uint32(b[12:])
	switch {
	case le.Uint32(b[4:]) != v5Version || le.Uint32(b[8:]) != v5SuperSize:
		return nil, invalid("bootstrap is RAFS of version %#x, which is not known", le.Uint32(b[4:]))
	case chunk < minChunkSize || chunk > index.MaxChunk || bits.OnesCount32(chunk) != 1:
		return nil, invalid("chunks of %d bytes; convert the image with a power of two from %d to %d", chunk, minChunkSize, index.MaxChunk)
	}
	v := &v5{file: c, flags: flags(le.Uint64(b[16:]))}
	if err := v.flags.check(); err != nil {
		return nil, err
	}
	if v.inodes, err = c.table(le.Uint64(b[32:]), uint64(le.Uint32(b[56:])), 4); err != nil {
		return nil, fmt.Errorf("inode table: %w", err)
	}
	if err := v.readBlobs(b); err != nil {
		return nil, fmt.Errorf("blob table: %w", err)
	}
	listed, err := c.table(le.Uint64(b[40:]), uint64(le.Uint32(b[60:])), 4)
	if err != nil {
		return nil, fmt.Errorf("prefetch table: %w", err)
	}
	for ; len(listed) > 0; listed = listed[4:] {
		v.listed = append(v.listed, uint64(le.Uint32(listed)))
	}
	return v, nil
}

// readBlobs reads the blob table that a superblock names: for each blob two
// numbers for readahead and its id, with zero bytes between. The features are in
// a second table, which old bootstraps do not have.
func (v *v5) readBlobs(super []byte) error {
	b, err := v.file.at(le.Uint64(super[48:]), uint64(le.Uint32(super[64:])))
	if err != nil {
		return err
	}
	ext, err := v.file.table(le.Uint64(super[72:]), uint64(le.Uint32(super[68:])), v5BlobExt)
	if err != nil {
		return err
	}
	for len(b) > 8 {
		id, rest, _ := bytes.Cut(b[8:], []byte{0})
		blob := &blob{id: string(id), compressor: v.flags.compressor()}
		if len(ext) > 0 {
			blob.features, blob.size = le.Uint32(ext[4:]), le.Uint64(ext[16:])
			ext = ext[v5BlobExt:]
		}
		if err := blob.check(); err != nil {
			return err
		}
		if blob.packed() || blob.features&featureSeparate != 0 {
			return invalid("blob %.80q has features %#x that v5 does not have", blob.id, blob.features)
		}
		v.blobList, b = append(v.blobList, blob), rest
	}
	return nil
}

func (v *v5) blobs() []*blob             { return v.blobList }
func (v *v5) algorithm() index.Algorithm { return v.flags.algorithm() }
func (v *v5) root() uint64               { return 1 }
func (v *v5) prefetch() []uint64         { return v.listed }

// at returns the bootstrap from an inode on. Inodes count from 1.
func (v *v5) at(number uint64) (content, error) {
	if number == 0 || number > uint64(len(v.inodes)/4) {
		return nil, invalid("inode %d of %d", number, len(v.inodes)/4)
	}
	off := uint64(le.Uint32(v.inodes[(number-1)*4:])) << 3
	if _, err := v.file.at(off, v5Inode); err != nil {
		return nil, fmt.Errorf("inode %d: %w", number, err)
	}
	return v.file[off:], nil
}

// inode implements format.
func (v *v5) inode(number uint64) (*inode, error) {
	raw, err := v.at(number)
	if err != nil {
		return nil, err
	}
	i := &inode{raw: raw, union: le.Uint32(raw[92:]), count: le.Uint32(raw[96:])}
	if err := v.attributes(i, raw); err != nil {
		return nil, fmt.Errorf("inode %d: %w", number, err)
	}
	return i, nil
}

// attributes reads an inode and what follows it: name, target of a symlink,
// extended attributes, each filled up to 8 bytes.
func (v *v5) attributes(i *inode, b []byte) (err error) {
	e, mode, flags := &i.entry, le.Uint32(b[60:]), le.Uint64(b[80:])
	if e.Kind, err = kindOf(mode); err != nil {
		return err
	}
	if flags&^v5Known != 0 {
		return invalid("unknown flags %#x", flags)
	}
	e.Mode, e.Sec, e.Nsec = uint16(mode&0o7777), int64(le.Uint64(b[112:])), le.Uint32(b[108:])
	e.UID, e.GID = v.flags.owner(le.Uint32(b[48:]), le.Uint32(b[52:]))
	setDevice(e, le.Uint32(b[104:]))
	i.key, i.links = le.Uint64(b[40:]), le.Uint32(b[88:])
	i.mixed = flags&v5Hole != 0
	i.body = v5Inode + align8(uint64(le.Uint16(b[100:])))
	if e.Kind == index.File {
		e.Size = int64(le.Uint64(b[64:]))
	}
	if flags&v5Symlink != 0 {
		target, err := i.raw.at(i.body, uint64(le.Uint16(b[102:])))
		if err != nil {
			return fmt.Errorf("target: %w", err)
		}
		e.Link = string(target)
		i.body += align8(uint64(len(target)))
	}
	if flags&v5Xattr != 0 {
		return i.readV5Xattrs()
	}
	return nil
}

func align8(n uint64) uint64 { return (n + 7) &^ 7 }

// readV5Xattrs reads extended attributes: their length, then for each the
// length of name, zero byte and value.
func (i *inode) readV5Xattrs() error {
	b, err := i.raw.at(i.body, 8)
	if err != nil {
		return err
	}
	size := le.Uint64(b)
	if b, err = i.raw.at(i.body+8, size); err != nil {
		return fmt.Errorf("extended attributes: %w", err)
	}
	i.body += 8 + align8(size)
	for c := content(b); len(c) > 0; {
		n, err := c.at(0, 4)
		if err != nil {
			return fmt.Errorf("extended attributes: %w", err)
		}
		pair, err := c.at(4, uint64(le.Uint32(n)))
		if err != nil {
			return fmt.Errorf("extended attributes: %w", err)
		}
		name, value, ok := bytes.Cut(pair, []byte{0})
		if !ok {
			return invalid("extended attribute %.255q has no value", name)
		}
		i.entry.Xattrs = append(i.entry.Xattrs, index.Xattr{Name: string(name), Value: string(value)})
		c = c[4+len(pair):]
	}
	index.SortXattrs(i.entry.Xattrs)
	return nil
}

// list implements format. The children of a directory have numbers that follow
// each other.
func (v *v5) list(d *inode) (children, error) {
	return &v5Names{v: v, number: uint64(d.union), end: uint64(d.union) + uint64(d.count)}, nil
}

type v5Names struct {
	v           *v5
	number, end uint64
}

func (n *v5Names) next() (string, uint64, bool, error) {
	if n.number == n.end {
		return "", 0, false, nil
	}
	raw, err := n.v.at(n.number)
	if err != nil {
		return "", 0, false, err
	}
	name, err := raw.at(v5Inode, uint64(le.Uint16(raw[100:])))
	if err != nil {
		return "", 0, false, fmt.Errorf("name of inode %d: %w", n.number, err)
	}
	n.number++
	return string(name), n.number - 1, true, nil
}

// chunks implements format. The records follow the inode.
func (v *v5) chunks(f *inode, add func(*record) error) error {
	list, err := f.raw.table(f.body, uint64(f.count), recordSize)
	if err != nil {
		return fmt.Errorf("chunks: %w", err)
	}
	for ; len(list) > 0; list = list[recordSize:] {
		r := parseRecord(list)
		if err := add(&r); err != nil {
			return err
		}
	}
	return nil
}
