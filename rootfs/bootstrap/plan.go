package bootstrap

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/tatami-containers/tatami/rootfs/index"
)

const (
	blockSize  = index.BlockSize
	superOff   = 1024 // of the superblock in the image, bytes
	superSize  = 128
	inodeSize  = 64 // of an extended inode; the compact one has no mtime
	slotSize   = 32 // inodes start at multiples; their number is the slot
	direntSize = 12
)

// A plan says where everything in the bootstrap goes:
//
//	1024  superblock
//	1152  inodes, each followed by its extended attributes and, if they fit
//	      into the same block, by the entries of a directory or the target of
//	      a symlink
//	      from a block boundary on: entries and targets that did not fit
type plan struct {
	*tree
	dirs     []directory // each before those in it
	children []nodeID    // of all directories, one after the other
	count    uint64      // inodes in the image
	end      int64       // of the inodes so far, bytes
	blocks   uint32      // of data that is not inline so far
	data     uint32      // block where that data starts
	size     int64       // of the bootstrap in bytes, whole blocks
	scratch  []dirent
}

// A directory is one that is in the image.
type directory struct {
	node        nodeID
	parent      inodeID
	first, last uint32 // part of plan.children, by name
	size        int64  // of its entries in bytes
}

func newPlan(t *tree) (*plan, error) {
	p := &plan{tree: t, children: make([]nodeID, 0, len(t.nodes)), end: superOff + superSize}
	if t.root == 0 { // an image without layers
		t.root = t.add(0, "", t.newInode(bare(), 0), implied)
	}
	p.collect()
	if err := p.place(t.nodes[t.root].inode); err != nil {
		return nil, err
	}
	for i := range p.dirs {
		if err := p.placeChildren(&p.dirs[i]); err != nil {
			return nil, err
		}
	}
	start := index.RoundUp(p.end)
	p.data = uint32(start / blockSize)
	p.size = start + int64(p.blocks)*blockSize
	if p.size > index.MaxBootstrap {
		return nil, invalid("the metadata take %d bytes, more than %d", p.size, int64(index.MaxBootstrap))
	}
	return p, nil
}

// collect lists the directories and what is in each, and counts links.
func (p *plan) collect() {
	root := p.nodes[p.root].inode
	type todo struct {
		node   nodeID
		parent inodeID
	}
	stack := []todo{{p.root, root}}
	for len(stack) > 0 {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		self := p.nodes[d.node].inode
		p.inodes[self].dir = uint32(len(p.dirs))
		p.inodes[self].nlink += 2
		children := p.list(d.node)
		for _, n := range slices.Backward(children) { // the first is to be on top
			i := &p.inodes[p.nodes[n].inode]
			if i.entry.Kind == index.Dir {
				p.inodes[self].nlink++
				stack = append(stack, todo{n, self})
			} else {
				i.nlink++
			}
		}
		last := uint32(len(p.children))
		p.dirs = append(p.dirs, directory{node: d.node, parent: d.parent, first: last - uint32(len(children)), last: last})
		p.dirs[len(p.dirs)-1].size = p.measure(&p.dirs[len(p.dirs)-1])
	}
}

// list appends what is in a directory to children, sorted by name as bytes.
func (p *plan) list(dir nodeID) []nodeID {
	first := len(p.children)
	for n := p.nodes[dir].child; n != 0; n = p.nodes[n].next {
		if p.nodes[n].inode != 0 && p.nodes[n].parent == dir {
			p.children = append(p.children, n)
		}
	}
	out := p.children[first:]
	slices.Reverse(out) // back to the order of the layer, which often is sorted
	slices.SortFunc(out, func(a, b nodeID) int { return cmp.Compare(p.nodes[a].name, p.nodes[b].name) })
	return out
}

// placeChildren gives the inodes in a directory places next to each other.
func (p *plan) placeChildren(d *directory) error {
	for _, n := range p.children[d.first:d.last] {
		i := p.nodes[n].inode
		if p.inodes[i].nid != 0 {
			continue // a hard link
		}
		if err := p.place(i); err != nil {
			return err
		}
	}
	return nil
}

// place gives an inode its place. The inode itself never crosses a block
// boundary; nor does what has inline data, with attributes and all: kernels
// differ in what they accept there (fs/erofs/inode.c, erofs_fill_symlink).
func (p *plan) place(id inodeID) error {
	i := &p.inodes[id]
	xattrs, err := xattrSize(i.entry)
	if err != nil {
		return fmt.Errorf("layer %s: %q: %w", p.layers[i.layer].Blob, i.entry.Path, err)
	}
	tail := p.tail(i)
	whole := inodeSize + xattrs + tail
	keep := int64(inodeSize) // must stay in one block
	if tail > 0 {
		if inline(xattrs, tail) {
			keep = whole
		} else {
			whole -= tail
			i.block = p.blocks
			p.blocks += uint32(index.RoundUp(tail) / blockSize)
		}
	}
	at := (p.end + slotSize - 1) &^ (slotSize - 1)
	if at%blockSize+keep > blockSize {
		at = index.RoundUp(at)
	}
	p.end = at + whole
	if p.end+int64(p.blocks)*blockSize > index.MaxBootstrap {
		return invalid("the metadata take more than %d bytes", int64(index.MaxBootstrap))
	}
	i.nid = uint32(at / slotSize)
	p.count++
	return nil
}

// inline says whether data of that length, in bytes, follow their inode.
func inline(xattrs, tail int64) bool {
	return tail > 0 && inodeSize+xattrs+tail <= blockSize
}

// tail is the length in bytes of the data that the bootstrap holds for an
// inode.
func (p *plan) tail(i *inode) int64 {
	switch i.entry.Kind {
	case index.Dir:
		return p.dirs[i.dir].size
	case index.Symlink:
		return int64(len(i.entry.Link))
	}
	return 0
}

// A dirent is an entry of a directory.
type dirent struct {
	name  string
	inode inodeID
}

// dirents lists a directory with "." and "..", by name as bytes: "." is not
// first, names such as "+x" are smaller. The result lives until the next call.
func (p *plan) dirents(d *directory) []dirent {
	dots := []dirent{{".", p.nodes[d.node].inode}, {"..", d.parent}}
	out := p.scratch[:0]
	for _, n := range p.children[d.first:d.last] {
		for len(dots) > 0 && dots[0].name < p.nodes[n].name {
			out, dots = append(out, dots[0]), dots[1:]
		}
		out = append(out, dirent{p.nodes[n].name, p.nodes[n].inode})
	}
	p.scratch = append(out, dots...)
	return p.scratch
}

// fill returns how many of the entries fit into a block, and their length in
// bytes.
func fill(entries []dirent) (n int, length int64) {
	for n < len(entries) {
		l := int64(direntSize + len(entries[n].name))
		if length+l > blockSize {
			break
		}
		length += l
		n++
	}
	return n, length
}

// measure is the size of a directory in bytes: whole blocks and what is used
// of the last.
func (p *plan) measure(d *directory) int64 {
	size := int64(0)
	for rest := p.dirents(d); ; {
		n, length := fill(rest)
		if rest = rest[n:]; len(rest) == 0 {
			return size + length
		}
		size += blockSize
	}
}

// An address of data is a block number of 32 bits; nothing larger is built.
const _ = uint(math.MaxUint32 - index.MaxImage/blockSize + 1)
