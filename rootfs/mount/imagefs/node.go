package imagefs

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// File is an image as an address space.
type File interface {
	// ReadAt fills p with the bytes from off on, which lie within Size, or
	// returns an error; fewer bytes without an error are a fault of the File.
	// It returns soon after ctx is done. Calls run concurrently.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Size is the length in bytes and never changes.
	Size() int64
}

// Ready is a File of which bytes may be at hand.
type Ready interface {
	File
	// ReadNow fills p with the bytes from off on, which lie within Size, if that needs
	// no waiting, not even for a disk. Otherwise it returns false, and p is undefined.
	ReadNow(p []byte, off int64) bool
}

// firstNode is the smallest id of a file: the root directory has 1.
const firstNode = fuse.FUSE_ROOT_ID + 1

// Node is one file of the filesystem.
type Node struct {
	// ID is above 1 and never used for anything else in this session.
	ID uint64
	// Name is the file's name in the session's directory, unique like ID: the
	// kernel may remember a name for a year.
	Name string
	File File
	// Reference is what logs call the image, beside Name.
	Reference string
	// Sealed refuses to open the file again; see Seal.
	Sealed bool
	// Cached lets the kernel keep the file's pages, for readers that share
	// them; what EROFS reads is cached there.
	Cached bool
}

type node struct {
	Node
	ready   Ready // File, if it is one; else nil
	size    int64
	sealed  atomic.Bool
	aborted atomic.Bool // reads fail at once
	reading sync.WaitGroup
}

// Add makes a file appear.
func (s *Server) Add(n Node) error {
	if n.ID < firstNode || n.Name == "" || n.File == nil {
		return fmt.Errorf("add file %q with node id %d: %w", n.Name, n.ID, errdefs.ErrInvalidArgument)
	}
	v := &node{Node: n, size: n.File.Size()}
	v.ready, _ = n.File.(Ready)
	v.sealed.Store(n.Sealed)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.nodes[n.ID] != nil || s.names[n.Name] != nil {
		return fmt.Errorf("add file %q with node id %d: %w", n.Name, n.ID, errdefs.ErrAlreadyExists)
	}
	s.nodes[n.ID], s.names[n.Name] = v, v
	return nil
}

// Seal refuses further opens of a file. What has it open goes on reading.
func (s *Server) Seal(id uint64) {
	if n := s.node(id); n != nil {
		n.sealed.Store(true)
	}
}

// Abort fails the reads of a file that are under way and all later ones, so
// that a mount(2) waiting for them returns.
func (s *Server) Abort(id uint64) {
	if n := s.node(id); n != nil {
		s.abort(n)
	}
}

func (s *Server) abort(n *node) {
	n.aborted.Store(true)
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, c := range s.calls {
		if c.node == n.ID {
			c.cancel()
		}
	}
}

// Remove makes a file disappear. Reads of it that are under way fail; when
// Remove returns, none is left, and the File may be closed.
func (s *Server) Remove(id uint64) {
	s.mu.Lock()
	n := s.nodes[id]
	if n != nil {
		delete(s.nodes, id)
		delete(s.names, n.Name)
	}
	s.mu.Unlock()
	if n == nil {
		return
	}
	s.abort(n)
	n.reading.Wait()
	s.complaints.forget(n.Name)
}

func (s *Server) node(id uint64) *node {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.nodes[id]
}

func (s *Server) nodeNamed(name string) *node {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.names[name]
}

// enter is node for a read that follows; leave ends it.
func (s *Server) enter(id uint64) *node {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := s.nodes[id]
	if n != nil {
		n.reading.Add(1)
	}
	return n
}

func (n *node) leave() { n.reading.Done() }
