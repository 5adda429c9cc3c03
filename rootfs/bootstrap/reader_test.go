package bootstrap_test

import (
	"bytes"
	"crypto/sha256"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofs/go-erofs"

	"github.com/tatami-containers/tatami/tests/torture"
)

// An independent reader, which is not the kernel's, sees the same tree.
func TestGoEROFS(t *testing.T) {
	dir := torture.TempFS(t)
	file, _ := imageFile(t, torture.Layers(), t.TempDir())
	mounted := torture.MountImage(t, file, dir, true)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // only read
	image, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	want := snapshot(t, mounted)
	seen := 0
	err = fs.WalkDir(image, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		seen++
		node, ok := want[path]
		if !ok {
			t.Errorf("%q is not there for the kernel", path)
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*erofs.Stat)
		if st.UID != node.UID || st.GID != node.GID || int64(st.Mtime) != node.Sec || int64(st.MtimeNs) != node.Nsec || uint64(st.Nlink) != node.Nlink {
			t.Errorf("%q: %+v, the kernel has %+v", path, st, node)
		}
		for name, v := range node.Xattrs {
			// v0.3.1 calls ACLs "system.posix_acl_access." with a dot behind.
			if st.Xattrs[name] != v && st.Xattrs[name+"."] != v {
				t.Errorf("%q: attribute %s: %q", path, name, st.Xattrs[name])
			}
		}
		switch {
		case info.Mode().IsRegular():
			b, err := fs.ReadFile(image, path)
			if err != nil {
				return err
			}
			if sha256.Sum256(b) != node.Sum {
				t.Errorf("%q: other content", path)
			}
		case info.Mode()&fs.ModeSymlink != 0:
			if l, err := fs.ReadLink(image, path); err != nil || l != node.Link {
				t.Errorf("%q: target %q, %v", path, l, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen != len(want) {
		t.Errorf("%d names, the kernel has %d", seen, len(want))
	}
}

// One image with one file per extreme: past 4 GiB and not whole blocks.
func TestLargeFile(t *testing.T) {
	torture.Root(t)
	const size = 5<<30 + 1234
	layer := largeLayer(size)
	img := mustBuild(t, layer)
	file := filepath.Join(t.TempDir(), "image.erofs")
	if err := os.WriteFile(file, img.Bootstrap, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, img.Size()); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	tail := []byte("the last bytes")
	if _, err := f.WriteAt(tail, img.Segments[0].Off+size-int64(len(tail))); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	fsck(t, file)
	dir := torture.MountImage(t, file, t.TempDir(), false)
	in, err := os.Open(filepath.Join(dir, "large"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }() // only read
	got, err := io.ReadAll(io.NewSectionReader(in, size-100, 1000))
	if err != nil || len(got) != 100 || !bytes.HasSuffix(got, tail) {
		t.Errorf("end of the file: %d bytes, %q, %v", len(got), got, err)
	}
	if fi, err := in.Stat(); err != nil || fi.Size() != size {
		t.Errorf("%v, %v", fi, err)
	}
}

// walk reads every name's attributes and every link's target.
func walk(image fs.FS) error {
	return fs.WalkDir(image, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			_, err = fs.ReadLink(image, path)
		}
		return err
	})
}
