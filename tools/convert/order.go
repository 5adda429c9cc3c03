package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

const markMode = 0o444

// landmark makes the tar entry of a landmark.
func landmark(name string) (*tar.Header, []byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: markMode, Size: int64(len(markContent))}
	if err := w.WriteHeader(h); err != nil {
		return nil, nil, err
	}
	if _, err := w.Write([]byte(markContent)); err != nil {
		return nil, nil, err
	}
	err := w.Flush() // pads
	return h, b.Bytes(), err
}

// reorder returns a tar with what profile lists in front, in its order, each
// file behind its directories and what it is a hard link to; then the landmark;
// then the rest as it was. moved is false, and the tar as it was, if the profile
// has nothing that may be moved.
func reorder(ctx context.Context, r io.Reader, profile []string) (_ io.Reader, moved bool, missing []string, err error) {
	at, ok := r.(io.ReaderAt)
	if !ok {
		return nil, false, nil, fmt.Errorf("a profile needs a tar that can be read twice, such as a file: %w", errdefs.ErrInvalidArgument)
	}
	o := order{names: make(map[string]int), marked: make(map[string]bool)}
	if err := o.scan(ctx, at); err != nil {
		return nil, false, nil, err
	}
	for _, name := range profile {
		p, err := tarball.Clean(name)
		if name == "" || err != nil || !o.pick(p) {
			missing = append(missing, name)
		}
	}
	if len(o.first) == 0 {
		return r, false, missing, nil
	}
	reordered, err := o.reader(at)
	return reordered, true, missing, err
}

// order is what of a tar decides which entries may change places.
type order struct {
	entries []place
	end     int64          // of the last one
	names   map[string]int // of entries by path; several if there is more than one
	marked  map[string]bool
	first   []int // picked entries, in order
}

// several stands for more than one entry with a name.
const several = -1

// place is where an entry is in the tar.
type place struct {
	off, end int64
	typ      byte
	link     string // clean target of a hard link
	state    uint8
}

// States of an entry: where it goes.
const (
	inPlace uint8 = iota
	deciding
	inFront
	left // out
)

// section is a tar for archive/tar, which seeks over data.
type section struct {
	ctx context.Context
	*io.SectionReader
}

func (s section) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.SectionReader.Read(p)
}

// scan lists the entries.
func (o *order) scan(ctx context.Context, at io.ReaderAt) error {
	s := section{ctx, io.NewSectionReader(at, 0, math.MaxInt64)}
	t := tar.NewReader(s)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return blameTar(err)
		}
		if err := checkData(h); err != nil {
			return err
		}
		if len(o.entries) >= index.MaxEntries {
			return invalidEntry(h.Name, errors.New("too many entries in one layer"))
		}
		data, err := s.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		n := dataSize(h)
		if err := o.add(h, data+n+-n&(blockSize-1)); err != nil {
			return invalidEntry(h.Name, err)
		}
	}
}

// add notes an entry that ends at byte end.
func (o *order) add(h *tar.Header, end int64) error {
	e := place{off: o.end, end: end, typ: h.Typeflag}
	o.end = end
	if h.Typeflag == tar.TypeXGlobalHeader {
		o.entries = append(o.entries, e)
		return nil
	}
	name, err := tarball.Clean(h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		if e.link, err = tarball.Clean(h.Linkname); err != nil {
			return err
		}
	}
	mark, about, err := tarball.Mark(name)
	if err != nil {
		return err
	}
	switch {
	case mark == tarball.WhiteoutMark || mark == tarball.OpaqueMark:
		o.marked[about] = true
	case isMark(name):
		e.state = left
	}
	if _, twice := o.names[name]; twice {
		o.names[name] = several
	} else {
		o.names[name] = len(o.entries)
	}
	o.entries = append(o.entries, e)
	return nil
}

// pick puts an entry in front, with all that must come before it; false if
// there is none or unpackers might then make something else of the layer.
func (o *order) pick(name string) bool {
	i, ok := o.names[name]
	if !ok || i == several || o.marked[name] {
		return false
	}
	e := &o.entries[i]
	if mark, _, _ := tarball.Mark(name); mark != tarball.NoMarker {
		return false
	}
	switch e.state {
	case inFront:
		return true
	case deciding, left:
		return false
	}
	e.state = deciding
	if !o.parent(name) || e.typ == tar.TypeLink && !o.pick(e.link) {
		e.state = inPlace
		return false
	}
	e.state = inFront
	o.first = append(o.first, i)
	return true
}

// parent puts the directories above name in front. They need not have entries,
// but nothing else may have their names, and no whiteout may hide them.
func (o *order) parent(name string) bool {
	if name == "" {
		return true
	}
	dir, _ := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	i, ok := o.names[dir]
	switch {
	case o.marked[dir]:
		return false
	case !ok:
		return o.parent(dir)
	}
	return i != several && o.entries[i].typ == tar.TypeDir && o.pick(dir)
}

// reader reads the tar in its new order.
func (o *order) reader(at io.ReaderAt) (io.Reader, error) {
	_, mark, err := landmark(prefetchMark)
	if err != nil {
		return nil, err
	}
	var list []io.Reader
	add := func(off, end int64) { list = append(list, io.NewSectionReader(at, off, end-off)) }
	for _, i := range o.first {
		add(o.entries[i].off, o.entries[i].end)
	}
	list = append(list, bytes.NewReader(mark))
	from := int64(0) // of what stays together
	for _, e := range o.entries {
		if e.state == inPlace {
			continue
		}
		if from < e.off {
			add(from, e.off)
		}
		from = e.end
	}
	add(from, math.MaxInt64)
	return io.MultiReader(list...), nil
}
