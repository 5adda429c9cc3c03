// Package treecmp compares file trees as the kernel shows them: every
// attribute that a container can see, so that two ways of mounting one image
// can be held to the same result. Linux only, for tests.
package treecmp

import (
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Tree maps the path below the root ("." for the root itself, else without a
// leading "./") to what is there.
type Tree map[string]Node

// Node is what can be seen of one name.
type Node struct {
	Mode     uint32 // type, set-id, sticky and permission bits as in st_mode
	UID, GID uint32
	Nlink    uint64
	// Group is the first path, bytewise, of the names in this tree that share
	// the inode; empty when no other name does.
	Group  string
	Sec    int64             // modification time, seconds since 1970
	Nsec   int64             // and nanoseconds
	Rdev   uint64            // of character and block devices, else 0
	Xattrs map[string]string // with ACLs; without trusted.overlay.*
	Link   string            // target of a symlink
	Size   int64             // of a regular file in bytes, else 0
	Sum    [32]byte          // SHA-256 of a regular file's content
}

// Field is an attribute that Diff can be told to pass over.
type Field string

// Attributes of a Node, as Diff names them.
const (
	Mode    Field = "mode"
	Owner   Field = "owner"
	Nlink   Field = "nlink"
	Group   Field = "hard-link group"
	Mtime   Field = "mtime"
	Rdev    Field = "rdev"
	Xattrs  Field = "xattr"
	Link    Field = "link target"
	Size    Field = "size"
	Content Field = "content"
)

type inode struct{ dev, ino uint64 }

// Snapshot reads the whole tree at root, file contents included, but for what
// lies at or below the paths of skip. It needs the rights to read every file
// and, for trusted.* attributes, CAP_SYS_ADMIN.
func Snapshot(root string, skip ...string) (Tree, error) {
	s := snapshot{tree: Tree{}, names: map[inode][]string{}, sums: map[inode][32]byte{}}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		switch {
		case err != nil:
			return err
		case !slices.Contains(skip, rel):
			return s.add(path, rel)
		case d.IsDir():
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", root, err)
	}
	s.group()
	return s.tree, nil
}

type snapshot struct {
	tree  Tree
	names map[inode][]string // names of everything that is not a directory
	sums  map[inode][32]byte // each content is read once
}

func (s *snapshot) add(path, rel string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	n := Node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: st.Nlink, Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}
	id := inode{st.Dev, st.Ino}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Size = st.Size
		n.Sum, err = s.sum(path, id)
	case unix.S_IFLNK:
		n.Link, err = readlink(path)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = st.Rdev
	}
	if err != nil {
		return err
	}
	if n.Xattrs, err = xattrs(path); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		s.names[id] = append(s.names[id], rel)
	}
	s.tree[rel] = n
	return nil
}

// group fills Node.Group, which is known only when every name has been seen.
func (s *snapshot) group() {
	for _, names := range s.names {
		if len(names) < 2 {
			continue
		}
		first := slices.Min(names)
		for _, name := range names {
			n := s.tree[name]
			n.Group = first
			s.tree[name] = n
		}
	}
}

// Diff lists the differences between two trees, one line for each, sorted by
// path; it is empty when they are the same. Link counts of directories are not
// compared: overlayfs and btrfs show 1 whatever is in them.
func Diff(a, b Tree, ignore ...Field) []string {
	var out []string
	paths := slices.Collect(maps.Keys(a))
	for p := range b {
		if _, ok := a[p]; !ok {
			paths = append(paths, p)
		}
	}
	slices.Sort(paths)
	for _, p := range paths {
		x, inA := a[p]
		y, inB := b[p]
		switch {
		case !inA:
			out = append(out, fmt.Sprintf("%q: only in the second tree", p))
		case !inB:
			out = append(out, fmt.Sprintf("%q: only in the first tree", p))
		default:
			out = append(out, diffNode(p, x, y, ignore)...)
		}
	}
	return out
}

func diffNode(path string, x, y Node, ignore []Field) []string {
	var out []string
	check := func(f Field, same bool, a, b any) {
		if !same && !slices.Contains(ignore, f) {
			out = append(out, fmt.Sprintf("%q: %s: %v, %v", path, f, a, b))
		}
	}
	check(Mode, x.Mode == y.Mode, fmt.Sprintf("%#o", x.Mode), fmt.Sprintf("%#o", y.Mode))
	check(Owner, x.UID == y.UID && x.GID == y.GID, fmt.Sprint(x.UID, ":", x.GID), fmt.Sprint(y.UID, ":", y.GID))
	dir := x.Mode&unix.S_IFMT == unix.S_IFDIR
	check(Nlink, dir || x.Nlink == y.Nlink, x.Nlink, y.Nlink)
	check(Group, x.Group == y.Group, quote(x.Group), quote(y.Group))
	check(Mtime, x.Sec == y.Sec && x.Nsec == y.Nsec, fmt.Sprintf("%d.%09d", x.Sec, x.Nsec), fmt.Sprintf("%d.%09d", y.Sec, y.Nsec))
	check(Rdev, x.Rdev == y.Rdev, fmt.Sprintf("%#x", x.Rdev), fmt.Sprintf("%#x", y.Rdev))
	check(Link, x.Link == y.Link, quote(x.Link), quote(y.Link))
	check(Size, x.Size == y.Size, x.Size, y.Size)
	check(Content, x.Sum == y.Sum, fmt.Sprintf("%x", x.Sum[:6]), fmt.Sprintf("%x", y.Sum[:6]))
	names := map[string]string{}
	maps.Copy(names, x.Xattrs)
	maps.Copy(names, y.Xattrs)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		v, inX := x.Xattrs[name]
		w, inY := y.Xattrs[name]
		check(Xattrs, inX == inY && v == w, value(name, v, inX), value(name, w, inY))
	}
	return out
}

// maxShown bounds how much of a long value a difference quotes, in bytes.
const maxShown = 60

func quote(s string) string {
	if len(s) > maxShown {
		return fmt.Sprintf("%q… (%d bytes)", s[:maxShown], len(s))
	}
	return fmt.Sprintf("%q", s)
}

func value(name, v string, present bool) string {
	if !present {
		return name + " absent"
	}
	return name + "=" + quote(v)
}
