package bootstrap

import (
	"fmt"
	"slices"
	"strings"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// An applier builds the tree of one layer, as an unpacker would in an empty
// directory.
type applier struct {
	*tree
	layer uint32
	upper nodeID // root of the layer's tree
	// bare is shared by all directories that get no attributes from anywhere.
	bare *index.Entry
	// The directory of the entry before; most entries have the same. It holds
	// until a name changes what it is.
	dir     string
	dirNode nodeID
	path    []place // memory for resolvers
}

// apply puts the layer with that number over what is merged so far.
func (t *tree) apply(number int) error {
	l := t.layers[number]
	if err := l.Table.Validate(); err != nil {
		return fmt.Errorf("layer %s: table: %w", l.Blob, err)
	}
	a := &applier{tree: t, layer: uint32(number), bare: bare()}
	first := nodeID(len(t.nodes))
	a.upper = t.add(0, "", t.newInode(a.bare, a.layer), implied)
	for i := range l.Entries {
		e := &l.Entries[i]
		err := e.Validate(l.Table.Size)
		if err == nil {
			err = a.entry(e)
		}
		if err != nil {
			return fmt.Errorf("layer %s: %q: %w", l.Blob, e.Path, err)
		}
	}
	a.inherit(first)
	t.overlay(a.upper)
	return nil
}

// entry applies one entry, which is valid.
func (a *applier) entry(e *index.Entry) error {
	if e.Path == "" || e.Kind == index.Opaque {
		return a.directory(e)
	}
	dir, name := "", e.Path
	if i := strings.LastIndexByte(e.Path, '/'); i >= 0 {
		dir, name = e.Path[:i], e.Path[i+1:]
	}
	parent, err := a.parent(dir)
	if err != nil {
		return err
	}
	if len(a.nodes) >= maxNames {
		return invalid("the layers have more than %d names", maxNames)
	}
	switch {
	case e.Kind == index.Whiteout:
		a.hide(parent, name)
	case e.Kind == index.Char && e.Major == 0 && e.Minor == 0:
		a.put(parent, name, 0)
		a.hide(parent, name)
	case e.Kind == index.Hardlink:
		return a.hardlink(e, parent, name)
	case e.Kind == index.Dir && a.isDir(a.names[key{parent, name}]):
		a.describe(a.names[key{parent, name}], e)
	default:
		a.put(parent, name, a.newInode(e, a.layer))
	}
	return nil
}

// directory applies an entry for the root, or an opaque mark: there the path
// is that of a directory, symlinks and all.
func (a *applier) directory(e *index.Entry) error {
	n, err := a.parent(e.Path)
	if err != nil {
		return err
	}
	if e.Kind == index.Opaque {
		a.nodes[n].flags |= opaque
		return nil
	}
	a.describe(n, e)
	return nil
}

// describe gives a directory the attributes of an entry.
func (a *applier) describe(n nodeID, e *index.Entry) {
	a.inodes[a.nodes[n].inode].entry = e
	a.nodes[n].flags &^= implied
}

// hide marks a name as removed from the lower layers. What this layer has of
// the name stays.
func (a *applier) hide(parent nodeID, name string) {
	if n := a.names[key{parent, name}]; n != 0 {
		a.nodes[n].flags |= whiteout
		return
	}
	a.add(parent, name, 0, whiteout)
}

// put gives a name an inode and removes what this layer had there.
func (a *applier) put(parent nodeID, name string, i inodeID) nodeID {
	old := a.names[key{parent, name}]
	if old == 0 {
		return a.add(parent, name, i, 0)
	}
	a.dirNode = 0
	keep := a.nodes[old].flags & whiteout
	if a.nodes[old].child == 0 {
		a.nodes[old].inode, a.nodes[old].flags = i, keep
		return old
	}
	// The children know the old number: a new one leaves them behind.
	a.nodes[old].inode, a.nodes[old].flags = 0, 0
	return a.add(parent, name, i, keep)
}

// hardlink removes what is at the name, in this layer and below, before it
// looks for the target: a link to itself has none.
func (a *applier) hardlink(e *index.Entry, parent nodeID, name string) error {
	a.put(parent, name, 0)
	i, err := a.target(e.Link)
	if err != nil {
		return err
	}
	a.put(parent, name, i)
	return nil
}

// target finds the inode that a hard link means.
func (a *applier) target(link string) (inodeID, error) {
	root := view{a.upper, a.root}
	if a.nodes[a.upper].flags&hides != 0 {
		root.lower = 0
	}
	r := resolver{tree: a.tree, path: append(a.path[:0], place{view: root}), keepLast: true}
	if err := r.walk(link); err != nil {
		return 0, fmt.Errorf("hard link to %q: %w", link, err)
	}
	i := a.seen(r.last().view)
	switch {
	case i == 0:
		return 0, invalid("hard link to %q, which does not exist", link)
	case a.inodes[i].entry.Kind == index.Dir:
		return 0, invalid("hard link to %q, which is a directory", link)
	}
	return i, nil
}

// parent finds the directory with the given path in this layer and makes what
// is missing of it.
func (a *applier) parent(path string) (nodeID, error) {
	if path == "" {
		return a.upper, nil
	}
	if path == a.dir && a.dirNode != 0 {
		return a.dirNode, nil
	}
	r := resolver{tree: a.tree, path: append(a.path[:0], place{view: view{upper: a.upper}})}
	if err := r.walk(path); err != nil {
		return 0, err
	}
	a.path = r.path
	n := a.upper
	for _, p := range r.path[1:] {
		var err error
		if n, err = a.enter(n, p.name); err != nil {
			return 0, err
		}
	}
	a.dir, a.dirNode = path, n
	return n, nil
}

// enter returns the directory of that name, made if this layer has none.
func (a *applier) enter(parent nodeID, name string) (nodeID, error) {
	n := a.names[key{parent, name}]
	switch e := a.at(n); {
	case e == nil:
	case e.Kind == index.Dir:
		return n, nil
	default:
		return 0, invalid("the layer has something at the parent %q that is not a directory", name)
	}
	if len(name) > index.MaxName {
		return 0, invalid("a symlink leads to a name of %d bytes", len(name))
	}
	if len(a.nodes) >= maxNames {
		return 0, invalid("the layers have more than %d names", maxNames)
	}
	n = a.put(parent, name, a.newInode(a.bare, a.layer))
	a.nodes[n].flags |= implied
	return n, nil
}

// inherit gives the implied directories among the layer's nodes, which start
// at first, the attributes that they have in the lower layers. Parents come
// before their children. A directory that the layer removes and makes anew has
// nothing to inherit; one that is only opaque has.
func (a *applier) inherit(first nodeID) {
	a.nodes[a.upper].lower = a.root
	for n := first; int(n) < len(a.nodes); n++ {
		if !a.isDir(n) {
			continue
		}
		nd := &a.nodes[n]
		if n != a.upper && nd.flags&whiteout == 0 {
			nd.lower = a.below(a.nodes[nd.parent].lower, nd.name)
		}
		if nd.flags&implied != 0 && nd.lower != 0 {
			from := &a.inodes[a.nodes[nd.lower].inode]
			to := &a.inodes[nd.inode]
			to.entry, to.layer = from.entry, from.layer
		}
	}
}

// below returns the directory of the merged tree that a name leads to; 0 if
// there is none.
func (a *applier) below(dir nodeID, name string) nodeID {
	if dir == 0 {
		return 0
	}
	n := a.names[key{dir, name}]
	if e := a.at(n); e == nil || e.Kind != index.Symlink {
		if a.isDir(n) {
			return n
		}
		return 0
	}
	r := resolver{tree: a.tree, path: a.ancestors(dir)}
	// Too many links, say, only mean that there is nothing to inherit.
	if err := r.walk(name); err != nil || !a.isDir(r.last().lower) {
		return 0
	}
	return r.last().lower
}

// ancestors is the way from the merged tree's root to one of its directories.
func (a *applier) ancestors(dir nodeID) []place {
	var path []place
	for ; dir != 0; dir = a.nodes[dir].parent {
		path = append(path, place{view: view{lower: dir}, name: a.nodes[dir].name})
	}
	slices.Reverse(path)
	return path
}
