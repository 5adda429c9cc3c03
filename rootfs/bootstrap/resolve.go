package bootstrap

import (
	"strings"

	"github.com/tatami-containers/tatami/rootfs/index"
)

const (
	// maxLinks is how many symlinks one path may lead through, as in
	// containerd's fs.RootPath.
	maxLinks = 255
	// maxSteps bounds the path elements visited because of symlinks, in all
	// layers together: some seconds of work.
	maxSteps = 64 << 20
)

// A view is one place seen in the layer that is being applied, in the merged
// tree below it, or in both; 0 where that one shows nothing.
type view struct{ upper, lower nodeID }

// seen is the inode that a view shows; 0 if none.
func (t *tree) seen(v view) inodeID {
	if v.upper != 0 {
		return t.nodes[v.upper].inode
	}
	return t.nodes[v.lower].inode
}

// step looks a name up in a directory.
func (t *tree) step(v view, name string) view {
	var out view
	if v.upper != 0 {
		out.upper = t.names[key{v.upper, name}]
	}
	// Only a directory over a directory lets the lower one be seen.
	n := &t.nodes[out.upper]
	if v.lower == 0 || out.upper != 0 && (n.flags&hides != 0 || !t.isDir(out.upper)) {
		return out
	}
	lower := t.names[key{v.lower, name}]
	if t.nodes[lower].inode == 0 || out.upper != 0 && !t.isDir(lower) {
		return out
	}
	out.lower = lower
	return out
}

// A place is a step on the way from the root.
type place struct {
	view
	name string
}

// A resolver follows a path from a directory, through symlinks, and never
// leaves the root. What does not exist is kept as a name, as unpackers do.
type resolver struct {
	*tree
	path     []place // from the root; never empty
	keepLast bool    // do not follow a symlink at the end of the path
	links    int
}

func (r *resolver) last() place { return r.path[len(r.path)-1] }

func (r *resolver) walk(path string) error {
	todo := []string{path} // what is left to do of the path and of each link
	for len(todo) > 0 {
		top := &todo[len(todo)-1]
		name, rest, more := strings.Cut(*top, "/")
		*top = rest
		if !more {
			todo = todo[:len(todo)-1]
		}
		// While a link's target is walked, the rest of the path is still to do.
		final := r.keepLast && len(todo) == 0
		target, err := r.element(name, final)
		if err != nil {
			return err
		}
		if target == "" {
			continue
		}
		if target[0] == '/' {
			r.path = r.path[:1]
		}
		todo = append(todo, target)
	}
	return nil
}

// element goes one step. It returns the target if the step is a symlink that
// is to be followed.
func (r *resolver) element(name string, final bool) (target string, err error) {
	if r.links > 0 {
		if r.steps++; r.steps > maxSteps {
			return "", invalid("the layers lead through too many symlinks")
		}
	}
	switch name {
	case "", ".":
		return "", nil
	case "..":
		r.path = r.path[:max(1, len(r.path)-1)]
		return "", nil
	}
	v := r.step(r.last().view, name)
	if e := r.inodes[r.seen(v)].entry; e != nil && e.Kind == index.Symlink && !final {
		if r.links++; r.links > maxLinks {
			return "", invalid("more than %d symlinks on the way", maxLinks)
		}
		return e.Link, nil
	}
	if len(r.path) > maxDepth {
		return "", invalid("more than %d directories on the way", maxDepth)
	}
	r.path = append(r.path, place{v, name})
	return "", nil
}
