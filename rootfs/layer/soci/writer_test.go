package soci

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
)

// A node is a table to be written: its fields by their numbers, nil for absent.
type node []any

// write appends a FlatBuffer with one table as its root. What an offset leads to
// comes behind it, since offsets are unsigned, and nothing is aligned, which
// readers need not care about.
func write(root node) []byte {
	w := writer{make([]byte, 4)}
	w.table(0, root)
	return w.b
}

type writer struct{ b []byte }

func (w *writer) u16(v int)    { w.b = binary.LittleEndian.AppendUint16(w.b, uint16(v)) }
func (w *writer) u32(v uint32) { w.b = binary.LittleEndian.AppendUint32(w.b, v) }

// point makes the offset at a position lead to the end of what is written.
func (w *writer) point(at int) {
	binary.LittleEndian.PutUint32(w.b[at:], uint32(len(w.b)-at))
}

// table writes a vtable and the table, then what its fields lead to.
func (w *writer) table(from int, n node) {
	vtable := len(w.b)
	w.u16(4 + 2*len(n))
	w.u16(0) // the table's size, not needed to read it
	size := 4
	for _, f := range n {
		if f == nil {
			w.u16(0)
			continue
		}
		w.u16(size)
		size += width(f)
	}
	w.point(from)
	w.u32(uint32(len(w.b) - vtable))
	at := make([]int, len(n))
	for i, f := range n {
		at[i] = len(w.b)
		w.inline(f)
	}
	for i, f := range n {
		w.far(at[i], f)
	}
}

func width(f any) int {
	switch f.(type) {
	case byte:
		return 1
	case int64:
		return 8
	}
	return 4
}

func (w *writer) inline(f any) {
	switch v := f.(type) {
	case nil:
	case byte:
		w.b = append(w.b, v)
	case int64:
		w.b = binary.LittleEndian.AppendUint64(w.b, uint64(v))
	case int32:
		w.u32(uint32(v))
	case uint32:
		w.u32(v)
	default:
		w.u32(0)
	}
}

// far writes what the offset at a position is to lead to.
func (w *writer) far(at int, f any) {
	switch v := f.(type) {
	case node:
		w.table(at, v)
	case string:
		w.point(at)
		w.u32(uint32(len(v)))
		w.b = append(append(w.b, v...), 0)
	case []byte:
		w.point(at)
		w.u32(uint32(len(v)))
		w.b = append(w.b, v...)
	case []any:
		w.point(at)
		w.u32(uint32(len(v)))
		first := len(w.b)
		w.b = append(w.b, make([]byte, 4*len(v))...)
		for i, e := range v {
			w.far(first+4*i, e)
		}
	case repeated:
		w.point(at)
		w.u32(uint32(v.n))
		first := len(w.b)
		w.b = append(w.b, make([]byte, 4*v.n)...)
		w.far(first, v.of)
		to := first + int(binary.LittleEndian.Uint32(w.b[first:]))
		for i := range v.n {
			binary.LittleEndian.PutUint32(w.b[first+4*i:], uint32(to-first-4*i))
		}
	}
}

// repeated is a list that has one element n times, but only one copy of it.
type repeated struct {
	of any
	n  int
}

// options say how a ztoc is made.
type options struct {
	span int64
	v1   bool // leave out the first checkpoint
}

// ztocOf describes a blob as the real tool does: files by archive/tar, and
// where they are by how much of the stream was read.
func ztocOf(tb testing.TB, blob []byte, opts options) node {
	tb.Helper()
	var plain io.Reader = bytes.NewReader(blob)
	var info node
	if gzip.IsGzip(blob) {
		z := new(gzip.Pool).NewReader(bytes.NewReader(blob))
		z.Record(opts.span)
		data, err := io.ReadAll(z)
		if err != nil {
			tb.Fatal(err)
		}
		plain = bytes.NewReader(data)
		info = gzipInfo(blob, z.Checkpoints(), opts)
	} else {
		info = tarInfo(blob, opts.span)
	}
	files, size := listFiles(tb, plain)
	return node{"0.9", "test", int64(len(blob)), size, node{files}, info}
}

func gzipInfo(blob []byte, points []index.Checkpoint, opts options) node {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(points)))
	b = binary.LittleEndian.AppendUint64(b, uint64(opts.span))
	var digests []any
	for i, c := range points {
		in, end := (c.Bit+7)/8, int64(len(blob))
		if i+1 < len(points) {
			end = (points[i+1].Bit + 7) / 8
		}
		digests = append(digests, digest.FromBytes(blob[c.Bit/8:end]).String())
		if i == 0 && opts.v1 {
			continue
		}
		b = binary.LittleEndian.AppendUint64(b, uint64(in))
		b = binary.LittleEndian.AppendUint64(b, uint64(c.Out))
		b = append(b, byte(in*8-c.Bit))
		b = append(b, make([]byte, index.MaxWindow-len(c.Window))...)
		b = append(b, c.Window...)
	}
	return node{byte(1), int32(len(points) - 1), digests, b}
}

func tarInfo(blob []byte, span int64) node {
	var digests []any
	for part := range slices.Chunk(blob, int(span)) {
		digests = append(digests, digest.FromBytes(part).String())
	}
	return node{byte(2), int32(len(digests) - 1), digests, write(node{int32(2), span, int64(len(blob))})}
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func listFiles(tb testing.TB, plain io.Reader) ([]any, int64) {
	tb.Helper()
	c := &counter{r: plain}
	types := map[byte]string{
		tar.TypeReg: "reg", tar.TypeDir: "dir", tar.TypeSymlink: "symlink", tar.TypeLink: "hardlink",
		tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeFifo: "fifo",
	}
	var files []any
	for r := tar.NewReader(c); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, c.n
		}
		if err != nil {
			tb.Fatal(err)
		}
		text, err := h.ModTime.MarshalText()
		if err != nil {
			tb.Fatal(err)
		}
		files = append(files, node{
			h.Name, types[h.Typeflag], c.n, h.Size, h.Linkname, h.Mode, uint32(h.Uid), uint32(h.Gid), h.Uname, h.Gname,
			string(text), h.Devmajor, h.Devminor, listRecords(h.PAXRecords),
		})
	}
}

func listRecords(records map[string]string) []any {
	var list []any
	for k, v := range records {
		list = append(list, node{k, v})
	}
	return list
}
