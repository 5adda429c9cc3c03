package virtiofs

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// File is an image as an address space.
type File interface {
	// ReadAt fills p, which is private memory, with the bytes from off on, which
	// lie within Size, or returns an error; fewer bytes without an error are a
	// fault of the File. It returns soon after ctx is done. Calls run concurrently.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Size is the length in bytes and never changes.
	Size() int64
}

// Mapper is what a File may be besides: one that knows which of its bytes lie in
// open files of this process.
type Mapper interface {
	// Map says where the bytes from off on are: n of them from at on in f, as long
	// as stamp is valid. n is 0 when ReadAt has to be asked. It does no I/O.
	Map(off int64) (f *os.File, at, n int64, stamp uint64)
	// Valid says whether what Map answered for off with this stamp was right all
	// the time until now. What was read meanwhile counts only then, an error
	// included: f may even be closed.
	Valid(off int64, stamp uint64) bool
}

const maxName = 255 // bytes, NAME_MAX

// Directory is the files that a guest sees. They may come and go at any time.
type Directory struct {
	// Find is told of a name that a guest asks for and that is not there; it may
	// Add it. May be nil. Set before use, does not wait for anything slow.
	Find func(name string)
	// Cached lets the guest keep pages of the files, for readers that share them.
	// Without, only what is mounted on a file caches its data, once. Set before use.
	Cached bool

	mu    sync.RWMutex
	last  uint64 // id given last; the root directory has 1
	nodes map[uint64]*node
	names map[string]*node
}

// node is a file with its id. All but busy is immutable.
type node struct {
	id     uint64
	name   string
	file   File
	size   int64
	gone   context.Context // done when the node was removed
	remove context.CancelFunc
	busy   sync.WaitGroup // reads under way

	complained atomic.Int64 // when a failed read was logged last, unix seconds
}

// NewDirectory makes an empty one.
func NewDirectory() *Directory {
	return &Directory{last: fuse.FUSE_ROOT_ID, nodes: map[uint64]*node{}, names: map[string]*node{}}
}

// Add makes a file appear. A name begins with no dot, which hides files from
// guests. A guest that knew another file by that name may believe in its size until
// it forgets it, so do not use names again for other contents.
func (d *Directory) Add(name string, f File) error { return d.AddAs(0, name, f) }

// AddAs is Add with the node id by which guests know the file already, or will: from
// 2 to 1<<48-1, of no other file at any time. 0 stands for one that the Directory
// gives, which is more than any before.
func (d *Directory) AddAs(id uint64, name string, f File) error {
	if !validName(name) || f == nil || id == fuse.FUSE_ROOT_ID || id >= 1<<48 {
		return fmt.Errorf("add file %q: not a name to serve: %w", name, errdefs.ErrInvalidArgument)
	}
	n := &node{name: name, file: f, size: f.Size()}
	n.gone, n.remove = context.WithCancel(context.Background())
	d.mu.Lock()
	defer d.mu.Unlock()
	if id == 0 {
		id = d.last + 1
	}
	if d.names[name] != nil || d.nodes[id] != nil {
		n.remove()
		return fmt.Errorf("add file %q: %w", name, errdefs.ErrAlreadyExists)
	}
	n.id, d.last = id, max(d.last, id)
	d.nodes[n.id], d.names[name] = n, n
	return nil
}

func validName(s string) bool {
	return s != "" && len(s) <= maxName && s[0] != '.' && !strings.ContainsAny(s, "/\x00")
}

// Remove makes a file disappear, whoever has it open. Reads of it that are under
// way are cut short; when Remove returns, none is left, and the File may be closed.
func (d *Directory) Remove(name string) {
	d.mu.Lock()
	n := d.names[name]
	if n != nil {
		delete(d.nodes, n.id)
		delete(d.names, name)
	}
	d.mu.Unlock()
	if n != nil {
		n.remove()
		n.busy.Wait()
	}
}

// lookup finds a file by its name.
func (d *Directory) lookup(name string) *node {
	if n := d.named(name); n != nil || d.Find == nil || !validName(name) {
		return n
	}
	d.Find(name)
	return d.named(name)
}

func (d *Directory) named(name string) *node {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.names[name]
}

func (d *Directory) node(id uint64) *node {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.nodes[id]
}

// enter is node for a read that follows; leave ends it.
func (d *Directory) enter(id uint64) *node {
	d.mu.RLock()
	defer d.mu.RUnlock()
	n := d.nodes[id]
	if n != nil {
		n.busy.Add(1)
	}
	return n
}

func (n *node) leave() { n.busy.Done() }

// after lists the files with ids above id, in their order.
func (d *Directory) after(id uint64) []*node {
	d.mu.RLock()
	defer d.mu.RUnlock()
	var ns []*node
	for _, n := range d.nodes {
		if n.id > id {
			ns = append(ns, n)
		}
	}
	slices.SortFunc(ns, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	return ns
}
