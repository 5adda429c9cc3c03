package checknode

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// Bounds of what is read of a node.
const (
	maxFile    = 8 << 20 // bytes of a list of the kernel's
	maxEntries = 4096    // of a directory
	maxLinks   = 40      // on one path, as Linux has it (path_resolution(7))
)

// tree is a node's file system. Paths are absolute in the node; links are
// followed inside it and lead nowhere else.
type tree struct{ fsys fs.FS }

func openTree(root string) (tree, error) {
	if root == "" {
		root = "/"
	}
	st, err := os.Stat(root)
	if err != nil {
		return tree{}, fmt.Errorf("open the node's root: %w: %w", err, errdefs.ErrNotFound)
	}
	if !st.IsDir() {
		return tree{}, fmt.Errorf("the node's root %s is not a directory: %w", root, errdefs.ErrInvalidArgument)
	}
	return tree{os.DirFS(root)}, nil
}

// local is a path as package fs wants it.
func local(p string) string {
	if p = strings.TrimPrefix(path.Clean("/"+p), "/"); p != "" {
		return p
	}
	return "."
}

// resolve returns p without links.
func (t tree) resolve(p string) (string, error) {
	done, rest := "/", strings.Split(p, "/")
	for links := 0; len(rest) > 0; {
		next := path.Join(done, rest[0])
		rest = rest[1:]
		st, err := fs.Lstat(t.fsys, local(next))
		if err != nil {
			return "", pathError(p, err)
		}
		if st.Mode()&fs.ModeSymlink == 0 {
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%s: too many links: %w", p, errdefs.ErrInvalidArgument)
		}
		target, err := fs.ReadLink(t.fsys, local(next))
		if err != nil {
			return "", pathError(p, err)
		}
		if path.IsAbs(target) {
			done = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return done, nil
}

// pathError names the node's path, not that below the root.
func pathError(p string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("%s: %w", p, err)
}

func (t tree) stat(p string) (fs.FileInfo, error) {
	r, err := t.resolve(p)
	if err != nil {
		return nil, err
	}
	st, err := fs.Lstat(t.fsys, local(r))
	if err != nil {
		return nil, pathError(p, err)
	}
	return st, nil
}

func (t tree) exists(p string) bool {
	_, err := t.stat(p)
	return err == nil
}

// read reads a regular file of at most limit bytes.
func (t tree) read(p string, limit int64) ([]byte, error) {
	r, err := t.resolve(p)
	if err != nil {
		return nil, err
	}
	st, err := fs.Lstat(t.fsys, local(r))
	if err != nil {
		return nil, pathError(p, err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no file: %w", p, errdefs.ErrInvalidArgument)
	}
	f, err := t.fsys.Open(local(r))
	if err != nil {
		return nil, pathError(p, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, pathError(p, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes: %w", p, limit, errdefs.ErrInvalidArgument)
	}
	return data, nil
}

// list returns a directory's entries, sorted by name.
func (t tree) list(p string) ([]fs.DirEntry, error) {
	r, err := t.resolve(p)
	if err != nil {
		return nil, err
	}
	list, err := fs.ReadDir(t.fsys, local(r))
	if err != nil {
		return nil, pathError(p, err)
	}
	if len(list) > maxEntries {
		return nil, fmt.Errorf("%s has more than %d entries: %w", p, maxEntries, errdefs.ErrInvalidArgument)
	}
	return list, nil
}

// glob expands a pattern, element by element, as filepath.Glob does.
func (t tree) glob(pattern string) ([]string, error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, fmt.Errorf("pattern %s: %w: %w", pattern, err, errdefs.ErrInvalidArgument)
	}
	found := []string{"/"}
	for _, el := range strings.Split(strings.Trim(path.Clean(pattern), "/"), "/") {
		var next []string
		for _, dir := range found {
			next = append(next, t.matches(dir, el)...)
			if len(next) > maxEntries {
				return nil, fmt.Errorf("pattern %s matches more than %d files: %w", pattern, maxEntries, errdefs.ErrInvalidArgument)
			}
		}
		found = next
	}
	return found, nil
}

// matches are the entries of dir that one element of a pattern matches.
func (t tree) matches(dir, el string) []string {
	if !strings.ContainsAny(el, `*?[\`) {
		if p := path.Join(dir, el); t.exists(p) {
			return []string{p}
		}
		return nil
	}
	list, err := t.list(dir)
	if err != nil {
		return nil // as filepath.Glob: what cannot be read matches nothing
	}
	var out []string
	for _, e := range list {
		if ok, _ := path.Match(el, e.Name()); ok { // the pattern was checked
			out = append(out, path.Join(dir, e.Name()))
		}
	}
	return out
}
