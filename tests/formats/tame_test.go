package formats

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"path"
	"strings"
	"testing"
	"unicode/utf8"
)

// An edit looks at the entries of one layer in order. It alters a header or
// returns false to leave the entry out.
type edit func(*tar.Header) bool

// edited rewrites layers; each one gets an edit of its own.
func edited(t *testing.T, tars [][]byte, newEdit func(tar []byte) edit) [][]byte {
	t.Helper()
	var out [][]byte
	for _, b := range tars {
		var buf bytes.Buffer
		if err := rewrite(&buf, b, newEdit(b)); err != nil {
			t.Fatal(err)
		}
		out = append(out, buf.Bytes())
	}
	return out
}

func rewrite(w io.Writer, b []byte, change edit) error {
	tw := tar.NewWriter(w)
	err := eachEntry(b, func(h *tar.Header, content io.Reader) error {
		h.Xattrs = nil //nolint:staticcheck // the reader fills it with what is in PAXRecords
		if !change(h) {
			return nil
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		_, err := io.Copy(tw, content)
		return err
	})
	return errors.Join(err, tw.Close())
}

func eachEntry(b []byte, do func(*tar.Header, io.Reader) error) error {
	tr := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := do(h, tr); err != nil {
			return err
		}
	}
}

// text drops names that are not UTF-8: tables of contents are JSON.
func text([]byte) edit {
	return func(h *tar.Header) bool { return utf8.ValidString(h.Name) && utf8.ValidString(h.Linkname) }
}

// once keeps the last entry for a name where there are several, and no link to
// such a name: newer makers of zstd:chunked refuse two, and the estargz library
// keeps the last one only, which may come behind a link to the first.
func once(b []byte) edit {
	left := map[string]int{}
	_ = eachEntry(b, func(h *tar.Header, _ io.Reader) error { // the same tar is read again, with its errors
		left[path.Clean(h.Name)]++
		return nil
	})
	several := map[string]bool{}
	for name, n := range left {
		several[name] = n > 1
	}
	return func(h *tar.Header) bool {
		name := path.Clean(h.Name)
		left[name]--
		return left[name] == 0 && (h.Typeflag != tar.TypeLink || !several[path.Clean(h.Linkname)])
	}
}

// nydusTakes drops what nydus-image 2.2 refuses or spoils: access control lists,
// of which it takes only names longer than theirs (nydus-rafs, RafsXAttrs.add);
// PAX records with a line feed in them, at which its tar reader ends a record;
// a directory that fills a block (shapes/4), behind whose last name its merge of
// bootstraps reads on; hard links but to the
// first name of a regular file in the layer (of symlinks it makes files without
// chunks), which get the file's attributes, as it takes those of the last name; entries below what the layer has as something
// else than a directory.
func nydusTakes([]byte) edit {
	other := map[string]bool{}       // what is no directory
	file := map[string]*tar.Header{} // regular files by their names
	return func(h *tar.Header) bool {
		delete(h.PAXRecords, "SCHILY.xattr.system.posix_acl_access")
		delete(h.PAXRecords, "SCHILY.xattr.system.posix_acl_default")
		name := path.Join("/", h.Name)
		for dir := path.Dir(name); dir != "/"; dir = path.Dir(dir) {
			if other[dir] {
				return false
			}
		}
		if strings.Contains(h.Name+h.Linkname, "\n") || strings.HasPrefix(name, "/shapes/4/") {
			return false
		}
		other[name] = h.Typeflag != tar.TypeDir
		switch h.Typeflag {
		case tar.TypeReg:
			first := *h
			file[name] = &first
		case tar.TypeLink:
			first := file[path.Join("/", h.Linkname)]
			if first == nil {
				return false
			}
			file[name] = first
			h.Linkname = strings.TrimPrefix(path.Join("/", first.Name), "/")
			h.Mode, h.Uid, h.Gid, h.ModTime = first.Mode, first.Uid, first.Gid, first.ModTime
		}
		return true
	}
}

// nydus5Takes drops hard links to files with attributes: nydus-image 2.2 writes
// other digests for them than it expects when it merges.
func nydus5Takes([]byte) edit {
	attributes := map[string]bool{}
	return func(h *tar.Header) bool {
		for key := range h.PAXRecords {
			if strings.HasPrefix(key, "SCHILY.xattr.") {
				attributes[h.Name] = true
			}
		}
		return h.Typeflag != tar.TypeLink || !attributes[h.Linkname]
	}
}
