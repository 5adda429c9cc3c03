package torture

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Index turns an uncompressed layer into its index and its segment, in the
// simplest way that can be right.
func Index(layer []byte) (*index.Layer, []byte, error) {
	d := digest.FromBytes(layer)
	p := parser{layer: &index.Layer{Blob: d, DiffID: d, BlobSize: int64(len(layer)), Access: index.Access{Format: index.Tar}}}
	in := &counter{r: bytes.NewReader(layer)}
	r := tar.NewReader(in)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil, err
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return nil, nil, err
		}
		if err := p.add(h, content, in.n-int64(len(content))); err != nil {
			return nil, nil, fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	p.cut()
	return p.layer, p.segment, nil
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += int64(n)
	return n, err
}

type parser struct {
	layer   *index.Layer
	layout  index.Layout
	segment []byte
}

// add appends an entry whose content is at the offset at of the layer.
func (p *parser) add(h *tar.Header, content []byte, at int64) error {
	e := index.Entry{
		Path: clean(h.Name), Mode: uint16(h.Mode & 0o7777), UID: uint32(h.Uid), GID: uint32(h.Gid),
		Sec: h.ModTime.Unix(), Nsec: uint32(h.ModTime.Nanosecond()),
	}
	for name, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(name, "SCHILY.xattr."); ok {
			e.Xattrs = append(e.Xattrs, index.Xattr{Name: name, Value: value})
		}
	}
	index.SortXattrs(e.Xattrs)
	switch h.Typeflag {
	case tar.TypeReg:
		if mark(&e) {
			break
		}
		e.Kind, e.Size = index.File, int64(len(content))
		e.Off = p.layout.Place(e.Size)
		if e.Size > 0 {
			p.layer.Access.Extents = append(p.layer.Access.Extents, index.Extent{Seg: e.Off, Tar: at, Len: e.Size})
		}
		p.segment = append(p.segment, content...)
		p.segment = append(p.segment, make([]byte, p.layout.Size()-int64(len(p.segment)))...)
	case tar.TypeDir:
		e.Kind = index.Dir
	case tar.TypeSymlink:
		e.Kind, e.Link = index.Symlink, h.Linkname
	case tar.TypeLink:
		e.Kind, e.Link = index.Hardlink, clean(h.Linkname)
	case tar.TypeChar:
		e.Kind, e.Major, e.Minor = index.Char, uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeBlock:
		e.Kind, e.Major, e.Minor = index.Block, uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		e.Kind = index.Fifo
	default:
		return fmt.Errorf("type %q", h.Typeflag)
	}
	p.layer.Entries = append(p.layer.Entries, e)
	return nil
}

// mark turns the entry into a whiteout or opaque mark if its name says so.
func mark(e *index.Entry) bool {
	dir, name := path.Split(e.Path)
	hidden, ok := strings.CutPrefix(name, ".wh.")
	switch {
	case !ok:
		return false
	case name == ".wh..wh..opq":
		e.Kind, e.Path = index.Opaque, clean(dir)
	default:
		e.Kind, e.Path = index.Whiteout, dir+hidden
	}
	return true
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// cut makes the table: units of the segment that are not all zero.
func (p *parser) cut() {
	size := int64(len(p.segment))
	t := index.Table{Size: size}
	for off := int64(0); off < size; off += index.UnitSize {
		unit := p.segment[off:min(off+index.UnitSize, size)]
		if len(bytes.Trim(unit, "\x00")) > 0 {
			t.Chunks = append(t.Chunks, index.Chunk{Off: off, Len: int64(len(unit)), Sum: sha256.Sum256(unit)})
		}
	}
	p.layer.Table = t
}
