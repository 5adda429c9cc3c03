package bootstrap

// overlay lays a layer's tree over the merged one, as overlayfs does: a
// directory over a directory is merged, everything else hides what is below.
// The layer's nodes become part of the merged tree.
func (t *tree) overlay(upper nodeID) {
	if t.root == 0 || t.nodes[upper].flags&hides != 0 {
		t.root = upper
		return
	}
	type pair struct{ upper, lower nodeID }
	todo := []pair{{upper, t.root}}
	for len(todo) > 0 {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		t.nodes[p.lower].inode = t.nodes[p.upper].inode
		for n := t.nodes[p.upper].child; n != 0; {
			next := t.nodes[n].next
			if low := t.merges(n, p.lower); low != 0 {
				todo = append(todo, pair{n, low})
			} else {
				t.replace(n, p.upper, p.lower)
			}
			n = next
		}
	}
}

// merges returns the directory in lower that the node n has to be merged with;
// 0 if n stands for itself.
func (t *tree) merges(n, lower nodeID) nodeID {
	if !t.isDir(n) || t.nodes[n].flags&hides != 0 {
		return 0
	}
	if low := t.names[key{lower, t.nodes[n].name}]; t.isDir(low) {
		return low
	}
	return 0
}

// replace moves n from the directory upper to the directory lower, in the
// place of what that has of the name. If n is but a whiteout, nothing remains.
func (t *tree) replace(n, upper, lower nodeID) {
	nd := &t.nodes[n]
	if nd.inode == 0 && nd.flags&whiteout == 0 {
		return // was replaced within its layer
	}
	delete(t.names, key{upper, nd.name})
	if low := t.names[key{lower, nd.name}]; low != 0 {
		t.nodes[low].inode = 0
	}
	if nd.inode != 0 {
		t.link(n, lower)
	}
}
