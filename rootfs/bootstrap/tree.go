package bootstrap

import (
	"github.com/tatami-containers/tatami/rootfs/index"
)

// Bounds of a tree, so that a small layer cannot ask for all memory.
const (
	maxNames = 8 << 20 // names in all layers together, made or implied
	maxDepth = 2048    // directories above a name; more do not fit into PATH_MAX
)

type (
	nodeID  uint32 // place in tree.nodes; 0 is none
	inodeID uint32 // place in tree.inodes; 0 is none
)

// A node is a name in a directory, of the merged tree or of the layer that is
// being applied. Nodes and inodes live in slices and refer to each other by
// number: half the size of pointers, and nothing for the collector to follow.
type node struct {
	name   string
	inode  inodeID // 0: nothing is here (any more); flags may still hide what is below
	parent nodeID
	child  nodeID // of a directory: the child that came last
	next   nodeID // the sibling that came before
	// lower is, while a layer is applied, the directory of the lower layers that
	// a directory of this layer stands for, hidden or not.
	lower nodeID
	flags flag
}

type flag uint8

const (
	whiteout flag = 1 << iota // the layer removes this name from the lower layers
	opaque                    // the layer's directory hides the lower one's content
	implied                   // a directory without an entry of its own
)

// hides says whether a node shows nothing of the lower layers.
const hides = whiteout | opaque

// An inode is what one or, with hard links, several nodes name.
type inode struct {
	entry *index.Entry // attributes
	layer uint32       // that the entry is of
	nlink uint32       // the rest is for the plan
	nid   uint32       // place in the image, in units of 32 bytes; 0: not in the image
	block uint32       // of a directory's or symlink's data, from the first such block; only if not inline
	dir   uint32       // place in plan.dirs
}

// key finds a node. The nodes of all directories share one map: small
// directories, which are most, then cost no map of their own.
type key struct {
	dir  nodeID
	name string
}

type tree struct {
	layers []*index.Layer
	nodes  []node
	inodes []inode
	names  map[key]nodeID
	root   nodeID // of the merged tree; 0 before the first layer
	steps  int    // path elements visited for symlinks so far, see maxSteps
}

// bare is what a directory is that no layer describes.
func bare() *index.Entry { return &index.Entry{Kind: index.Dir, Mode: 0o755} }

func newTree(layers []*index.Layer) *tree {
	n := 1
	for _, l := range layers {
		n += len(l.Entries) + 1
	}
	n = min(n, maxNames)
	return &tree{
		layers: layers,
		nodes:  make([]node, 1, n),
		inodes: make([]inode, 1, n),
		names:  make(map[key]nodeID, n),
	}
}

// at is the entry that a node shows; nil if nothing is there.
func (t *tree) at(n nodeID) *index.Entry {
	return t.inodes[t.nodes[n].inode].entry
}

func (t *tree) isDir(n nodeID) bool {
	e := t.at(n)
	return e != nil && e.Kind == index.Dir
}

// add makes a node in the directory parent, or a root if that is 0.
func (t *tree) add(parent nodeID, name string, i inodeID, f flag) nodeID {
	n := nodeID(len(t.nodes))
	t.nodes = append(t.nodes, node{name: name, inode: i, flags: f})
	if parent != 0 {
		t.link(n, parent)
	}
	return n
}

// link puts a node into a directory, over any other of the name.
func (t *tree) link(n, parent nodeID) {
	nd := &t.nodes[n]
	nd.parent, nd.next = parent, t.nodes[parent].child
	t.nodes[parent].child = n
	t.names[key{parent, nd.name}] = n
}

func (t *tree) newInode(e *index.Entry, layer uint32) inodeID {
	t.inodes = append(t.inodes, inode{entry: e, layer: layer})
	return inodeID(len(t.inodes) - 1)
}
