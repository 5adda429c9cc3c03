package virtiofs

import (
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Subtree is a file system that a [Tree] shows at one of its paths: a [Directory],
// or one that package passthrough makes.
type Subtree interface {
	// FileSystem answers requests whose node ids are the subtree's own: its root is
	// fuse.FUSE_ROOT_ID, all others are below 1<<48. Calls are concurrent, and may
	// come after an Unmount. No answer is ENOSYS, by which Linux would conclude that
	// no subtree knows the request.
	FileSystem() fuse.RawFileSystem
}

// Files is what a Subtree is besides that is no Directory: all of its requests may
// take their time, and its data lies in open files of this process.
type Files interface {
	// ReadV fills bufs, at most 1024 buffers of the guest, with what the handle's file
	// has at in.Offset, by one system call; fewer bytes mean the end of the file, or
	// that the call was cut short. Without wait it gives up with EAGAIN or EOPNOTSUPP
	// instead of waiting for a disk.
	ReadV(in *fuse.ReadIn, bufs [][]byte, wait bool) (int, syscall.Errno)
	// WriteV writes bufs at in.Offset in the same way.
	WriteV(in *fuse.WriteIn, bufs [][]byte) (int, syscall.Errno)
	// SyncFS makes the file system of a node durable.
	SyncFS(node uint64) syscall.Errno
	// Reset drops all nodes but the root, and all handles: a session began or ended.
	Reset()
}

// Node ids of the device: the subtree's index above, its own id below. Index 0 is
// mounted at "/", so what is there keeps its ids.
const (
	indexShift = 48
	localMask  = 1<<indexShift - 1
	dirIndex   = math.MaxUint16 // directories that lie above subtrees
	maxPath    = 4096           // bytes of a path that something is mounted at
)

// Tree is what a device shows: subtrees at paths. A directory above a subtree that
// belongs to no other one is the tree's own, read-only; one that belongs to another
// subtree gets the name besides, which is found but not listed.
//
// A tree changes while guests use it. What a guest knows of a subtree that was
// unmounted fails with ESTALE.
type Tree struct {
	mu   sync.RWMutex
	root *place
	subs map[uint64]*mounted // by index
	dirs map[uint64]*place   // the tree's own directories by node id, without the root
	// Index and directory given last. Indices come round only when all were used, so
	// that a guest has forgotten what the old one was.
	last, lastDir uint64
}

// place is a path at which, or below which, something is mounted. All but names and
// sub is immutable.
type place struct {
	parent *place
	name   string
	dir    uint64 // node id while nothing is mounted here
	names  map[string]*place
	sub    *mounted
}

// mounted is a subtree in its place. Immutable.
type mounted struct {
	index  uint64
	at     *place
	images *Directory // not nil for one
	fs     fuse.RawFileSystem
	files  Files         // of a subtree that is no Directory; may be nil
	slots  chan struct{} // one for each request of a subtree that may take its time
}

// NewTree makes an empty one.
func NewTree() *Tree {
	root := &place{dir: fuse.FUSE_ROOT_ID, names: map[string]*place{}}
	return &Tree{root: root, subs: map[uint64]*mounted{}, dirs: map[uint64]*place{}}
}

// node makes a node id of the device from one of the subtree.
func (m *mounted) node(local uint64) uint64 { return m.index<<indexShift | local&localMask }

// node is the id of what guests see at a place.
func (p *place) node() uint64 {
	if p.sub != nil {
		return p.sub.node(fuse.FUSE_ROOT_ID)
	}
	return p.dir
}

// Mount makes a subtree appear at a path, which begins with a slash.
func (t *Tree) Mount(at string, s Subtree) error {
	names, err := splitPath(at)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.walk(names); p != nil && p.sub != nil {
		return fmt.Errorf("mount at %s: %w", at, errdefs.ErrAlreadyExists)
	}
	index, err := t.freeIndex(len(names) == 0)
	if err != nil {
		return fmt.Errorf("mount at %s: %w", at, err)
	}
	m := &mounted{index: index, at: t.grow(names), fs: s.FileSystem(), slots: make(chan struct{}, maxRunning)}
	m.images, _ = s.(*Directory)
	m.files, _ = s.(Files)
	m.at.sub, t.subs[index] = m, m
	return nil
}

// Unmount makes the subtree at a path disappear. Requests that are under way end as
// they would have.
func (t *Tree) Unmount(at string) error {
	names, err := splitPath(at)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.walk(names)
	if p == nil || p.sub == nil {
		return fmt.Errorf("unmount %s: nothing is mounted there: %w", at, errdefs.ErrNotFound)
	}
	delete(t.subs, p.sub.index)
	p.sub = nil
	t.prune(p)
	return nil
}

// splitPath returns the names of a clean absolute path; none for "/".
func splitPath(at string) ([]string, error) {
	if !strings.HasPrefix(at, "/") || path.Clean(at) != at || len(at) > maxPath {
		return nil, fmt.Errorf("path %q: %w: it must be absolute and clean, of at most %d bytes", at, errdefs.ErrInvalidArgument, maxPath)
	}
	if at == "/" {
		return nil, nil
	}
	names := strings.Split(at[1:], "/")
	for _, n := range names {
		if len(n) > maxName || strings.Contains(n, "\x00") {
			return nil, fmt.Errorf("path %q: %w: %q is not a name", at, errdefs.ErrInvalidArgument, n)
		}
	}
	return names, nil
}

// walk finds a place, or nil. Precondition: mu is held.
func (t *Tree) walk(names []string) *place {
	p := t.root
	for _, n := range names {
		if p = p.names[n]; p == nil {
			return nil
		}
	}
	return p
}

// grow is walk that makes what is missing. Precondition: mu is held.
func (t *Tree) grow(names []string) *place {
	p := t.root
	for _, n := range names {
		next := p.names[n]
		if next == nil {
			t.lastDir++
			next = &place{parent: p, name: n, dir: dirIndex<<indexShift | t.lastDir, names: map[string]*place{}}
			p.names[n], t.dirs[next.dir] = next, next
		}
		p = next
	}
	return p
}

// prune removes a place that nothing needs, and those above. Precondition: mu is
// held.
func (t *Tree) prune(p *place) {
	for p.parent != nil && p.sub == nil && len(p.names) == 0 {
		delete(p.parent.names, p.name)
		delete(t.dirs, p.dir)
		p = p.parent
	}
}

// freeIndex gives out 0 for the root, 1 to dirIndex-1 for others. Precondition: mu is
// held.
func (t *Tree) freeIndex(root bool) (uint64, error) {
	if root {
		return 0, nil
	}
	for range dirIndex - 1 {
		t.last = t.last%(dirIndex-1) + 1
		if t.subs[t.last] == nil {
			return t.last, nil
		}
	}
	return 0, fmt.Errorf("%w: %d subtrees are mounted", errdefs.ErrResourceExhausted, len(t.subs))
}

// find returns the subtree of a node; nil for the tree's own directories, and for
// what does not exist.
func (t *Tree) find(node uint64) *mounted {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.subs[node>>indexShift]
}

// place is where a node lies if something may be mounted below, or nil.
// Precondition: mu is held.
func (t *Tree) place(node uint64) *place {
	if node == fuse.FUSE_ROOT_ID {
		return t.root
	}
	if p := t.dirs[node]; p != nil && p.sub == nil {
		return p
	}
	if m := t.subs[node>>indexShift]; m != nil && node&localMask == fuse.FUSE_ROOT_ID {
		return m.at
	}
	return nil
}

// own is place for the tree's own directories only.
func (t *Tree) own(node uint64) *place {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if p := t.place(node); p != nil && p.sub == nil {
		return p
	}
	return nil
}

// covered says whether a name in a directory is that of a place.
func (t *Tree) covered(node uint64, name string) bool {
	_, _, ok := t.child(node, name)
	return ok
}

// child finds the place of that name in a directory: its node, and the subtree there,
// which may be nil.
func (t *Tree) child(node uint64, name string) (uint64, *mounted, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if p := t.place(node); p != nil {
		if c := p.names[name]; c != nil {
			return c.node(), c.sub, true
		}
	}
	return 0, nil, false
}

// list returns what is in one of the tree's own directories, in order of the names.
// Offsets are the directories' numbers, so that a listing goes on at the right place
// when subtrees come and go.
func (t *Tree) list(p *place, off uint64) []fuse.DirEntry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var es []fuse.DirEntry
	for _, c := range slices.SortedFunc(maps.Values(p.names), func(a, b *place) int { return int(a.dir) - int(b.dir) }) {
		if n := c.dir & localMask; n > off {
			es = append(es, fuse.DirEntry{Name: c.name, Ino: c.node(), Mode: fuse.S_IFDIR, Off: n})
		}
	}
	return es
}

// mounts lists the subtrees.
func (t *Tree) mounts() []*mounted {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return slices.Collect(maps.Values(t.subs))
}
