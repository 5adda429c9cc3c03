package passthrough

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// key tells a file from all others, as long as it is open. The same file seen through
// another mount is another one: that may be read-only.
type key struct {
	major, minor uint32
	ino, mount   uint64
}

func keyOf(st *unix.Statx_t) key {
	return key{major: st.Dev_major, minor: st.Dev_minor, ino: st.Ino, mount: st.Mnt_id}
}

// node is a file that the guest knows. All but refs and lookups is immutable.
type node struct {
	id     uint64
	key    key
	kind   uint32 // S_IFMT bits
	fd     int    // O_PATH
	budget *Budget
	// refs are those who use fd: the table, and requests under way.
	refs    atomic.Int64
	lookups uint64 // times the guest was told of it and has not forgotten; by nodes.mu
}

// openable says whether the file may be opened for more than its name.
func (n *node) openable() bool { return n.kind == unix.S_IFREG || n.kind == unix.S_IFDIR }

// put ends the use that get began.
func (n *node) put() {
	if n.refs.Add(-1) == 0 {
		_ = unix.Close(n.fd) // O_PATH: nothing is lost
		n.budget.give(1)
	}
}

// nodes are the files that the guest knows, by number and by key.
type nodes struct {
	budget *Budget
	root   *node

	mu     sync.Mutex
	last   uint64 // number given last; never used again, or a guest could take one file for another
	byID   map[uint64]*node
	byKey  map[key]*node
	closed bool
}

func newNodes(root *os.File, b *Budget) (*nodes, error) {
	if err := b.take(); err != nil {
		return nil, err
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(int(root.Fd()), ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		b.give(1)
		return nil, fmt.Errorf("open the directory: %w", err)
	}
	n := &node{id: fuse.FUSE_ROOT_ID, fd: fd, kind: unix.S_IFDIR, budget: b}
	n.refs.Store(1)
	st, err := statx(fd)
	if err == nil && st.Mask&unix.STATX_MNT_ID == 0 {
		err = fmt.Errorf("%w: statx tells no mount, Linux 5.8 is needed", errdefs.ErrNotImplemented)
	}
	if err != nil {
		n.put()
		return nil, err
	}
	n.key = keyOf(&st)
	return &nodes{budget: b, root: n, last: n.id, byID: map[uint64]*node{n.id: n}, byKey: map[key]*node{n.key: n}}, nil
}

// statx describes the file of a descriptor.
func statx(fd int) (unix.Statx_t, error) {
	return retry(func() (st unix.Statx_t, err error) {
		err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st)
		return st, err
	})
}

// get finds a node; put ends its use.
func (t *nodes) get(id uint64) (*node, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byID[id]
	if n == nil {
		return nil, unix.ESTALE
	}
	n.refs.Add(1)
	return n, nil
}

// add counts that the guest is told of a file, whose descriptor it takes over. The
// budget was asked for fd.
func (t *nodes) add(fd int, st *unix.Statx_t) (*node, error) {
	k := keyOf(st)
	t.mu.Lock()
	n := t.byKey[k]
	known, closed := n != nil, t.closed
	if !known && !closed {
		t.last++
		n = &node{id: t.last, key: k, kind: uint32(st.Mode) & unix.S_IFMT, fd: fd, budget: t.budget}
		n.refs.Store(1)
		t.byID[n.id], t.byKey[k] = n, n
	}
	if !closed {
		n.lookups++
	}
	t.mu.Unlock()
	if known || closed {
		_ = unix.Close(fd) // O_PATH: nothing is lost
		t.budget.give(1)
	}
	if closed {
		return nil, unix.ESTALE
	}
	return n, nil
}

// forget takes back count times that the guest was told of a node. The root stays.
func (t *nodes) forget(id, count uint64) {
	t.mu.Lock()
	n := t.byID[id]
	if n == nil || n == t.root {
		t.mu.Unlock()
		return
	}
	n.lookups -= min(n.lookups, count)
	gone := n.lookups == 0
	if gone {
		delete(t.byID, n.id)
		delete(t.byKey, n.key)
	}
	t.mu.Unlock()
	if gone {
		n.put()
	}
}

// clear forgets all but the root.
func (t *nodes) clear() {
	t.mu.Lock()
	old := t.byID
	t.byID, t.byKey = map[uint64]*node{}, map[key]*node{}
	if !t.closed {
		t.byID[t.root.id], t.byKey[t.root.key] = t.root, t.root
		delete(old, t.root.id)
	}
	t.mu.Unlock()
	for _, n := range old {
		n.put()
	}
}

func (t *nodes) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.clear()
}
