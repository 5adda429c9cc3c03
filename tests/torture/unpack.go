package torture

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Unpack puts each layer into a directory of its own below dir, in the form
// that overlayfs takes, and returns the directories, lowest first. It works as
// containerd does for its overlay snapshotter (pkg/archive/tar.go), with these
// liberties, all of which the OCI image specification asks for or allows: a
// whiteout hides lower layers only, wherever it stands; hard links may lead to
// lower layers, which are then mounted below the layer, so that the kernel
// copies the file up; and implied directories have times that can be told. The
// directories must be on a filesystem that takes trusted.* attributes.
func Unpack(dir string, layers [][]byte) ([]string, error) {
	var dirs []string
	for n, l := range layers {
		u, err := newUnpacker(dir, n, dirs)
		if err != nil {
			return nil, err
		}
		if err := u.layer(l); err != nil {
			return nil, fmt.Errorf("unpack layer %d: %w", n, err)
		}
		dirs = append(dirs, u.root)
	}
	return dirs, nil
}

type unpacker struct {
	root    string // directory of the layer
	lower   string // where the layers below are mounted, merged; empty if there are none
	work    string // of overlayfs
	merged  string // mount point
	below   []string
	cut     map[string]bool // names that the layer removes from below
	implied map[string]bool // directories without an entry
	dirs    map[string]*tar.Header
}

func newUnpacker(dir string, n int, below []string) (*unpacker, error) {
	at := func(s string) string { return filepath.Join(dir, fmt.Sprintf("%d-%s", n, s)) }
	u := &unpacker{
		root: at("layer"), work: at("work"), merged: at("merged"), below: below,
		cut: map[string]bool{}, implied: map[string]bool{}, dirs: map[string]*tar.Header{},
	}
	if n > 0 {
		u.lower = at("lower")
	}
	for _, d := range []string{u.root, u.work, u.merged, at("lower")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	return u, nil
}

func (u *unpacker) layer(l []byte) (err error) {
	if u.lower != "" {
		if err := MountOverlay(u.lower, u.below); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unix.Unmount(u.lower, 0)) }()
	}
	r := tar.NewReader(bytes.NewReader(l))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return u.finish()
		}
		if err == nil {
			err = u.entry(h, r)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
}

func (u *unpacker) at(name string) string { return filepath.Join(u.root, name) }

func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	name := clean(h.Name)
	if name == "" {
		u.dirs[""] = h
		return clearXattrs(u.root)
	}
	dir, base := path.Split(name)
	dir, err := resolve(u.root, dir)
	if err != nil {
		return err
	}
	if err := u.parents(dir); err != nil {
		return err
	}
	name = path.Join(dir, base)
	if hidden, ok := strings.CutPrefix(base, ".wh."); ok && h.Typeflag == tar.TypeReg {
		if base == ".wh..wh..opq" {
			return unix.Setxattr(u.at(dir), "trusted.overlay.opaque", []byte("y"), 0)
		}
		return u.whiteout(path.Join(dir, hidden))
	}
	if h.Typeflag == tar.TypeLink {
		return u.link(name, clean(h.Linkname))
	}
	if fi, err := os.Lstat(u.at(name)); err == nil && (!fi.IsDir() || h.Typeflag != tar.TypeDir) {
		if err := u.remove(name); err != nil {
			return err
		}
	}
	return u.create(name, h, content)
}

func (u *unpacker) whiteout(name string) error {
	u.cut[name] = true
	err := unix.Mknod(u.at(name), unix.S_IFCHR, 0)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

func (u *unpacker) remove(name string) error {
	under := func(p string) bool { return p == name || strings.HasPrefix(p, name+"/") }
	maps.DeleteFunc(u.implied, func(p string, _ bool) bool { return under(p) })
	maps.DeleteFunc(u.dirs, func(p string, _ *tar.Header) bool { return under(p) })
	maps.DeleteFunc(u.cut, func(p string, _ bool) bool { return p != name && under(p) })
	return os.RemoveAll(u.at(name))
}

// parents makes the missing directories of a path.
func (u *unpacker) parents(dir string) error {
	for i := 0; i <= len(dir) && dir != ""; i++ {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		p := dir[:i]
		fi, err := os.Lstat(u.at(p))
		if err == nil && isWhiteout(fi) {
			err = fs.ErrNotExist
			if err := os.Remove(u.at(p)); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			u.implied[p] = true
			if err := os.Mkdir(u.at(p), 0o755); err != nil {
				return err
			}
		case err != nil:
			return err
		case !fi.IsDir():
			return &fs.PathError{Op: "mkdir", Path: p, Err: unix.ENOTDIR}
		}
	}
	return nil
}

func isWhiteout(fi fs.FileInfo) bool {
	st := fi.Sys().(*syscall.Stat_t)
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}
