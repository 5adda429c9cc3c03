package tarball

import (
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Limits of a layer, far above what images have, so that no layer can exhaust
// memory or the address space of an image.
const (
	maxExtents = 16 << 20
	maxText    = 512 << 20 // names, link targets and attributes, bytes
)

// Segment takes a segment's bytes from the first to the last.
type Segment interface {
	// Begin says that the bytes of a file follow, of the given size with all
	// holes. Bytes so far are whole blocks.
	Begin(path string, size int64) error
	// ReadFrom takes all bytes of r.
	ReadFrom(r io.Reader) (n int64, err error)
	// WriteZeros is as ReadFrom of n zeros, which may be many.
	WriteZeros(n int64) error
}

// Result is what a tar stream holds besides the segment's bytes.
type Result struct {
	Entries []index.Entry
	Extents []index.Extent
	Size    int64 // of the segment, bytes
}

// Scan reads a tar stream up to its end mark, not always to the end of r, and
// writes its files to seg. Errors that are the layer's fault are
// ErrInvalidArgument and name the entry; those of r and seg come as they are.
func Scan(r io.Reader, seg Segment) (*Result, error) {
	s := scanner{tar: reader{src: r}, seg: seg}
	for {
		h, err := s.tar.next()
		if errors.Is(err, io.EOF) {
			return s.end()
		}
		if err != nil {
			return nil, err
		}
		if err := s.add(h); err != nil {
			return nil, err
		}
	}
}

type scanner struct {
	tar    reader
	seg    Segment
	at     int64 // bytes of seg written
	layout index.Layout
	res    Result
	text   int64 // bytes of strings in res

	// pseudo are the files in aufs's directory of hard link targets, which is
	// itself no part of the layer: the first link to one becomes the file.
	pseudo map[string]index.Entry
}

// end pads the segment.
func (s *scanner) end() (*Result, error) {
	s.res.Size = s.layout.Size()
	return &s.res, s.zerosTo(s.res.Size)
}

// add takes in one entry of the stream.
func (s *scanner) add(h *header) error {
	e, keep, err := s.entry(h)
	content := keep && e.Kind == index.File && kind(h.flag) == index.File
	if err == nil && content {
		err = s.checkSize(h)
	}
	if err == nil && keep {
		err = e.Validate(index.MaxSegment)
	}
	if err != nil {
		return invalid(h.name, err)
	}
	if !keep {
		return nil
	}
	if content && h.size > 0 {
		if e.Off, err = s.content(h, e.Path); err != nil {
			return fmt.Errorf("tar entry %q: %w", shorten(h.name), err)
		}
	}
	return s.keep(e)
}

// keep adds an entry to the result.
func (s *scanner) keep(e index.Entry) error {
	if len(e.Path) >= len(linkDir) && e.Path[:len(linkDir)] == linkDir {
		if s.pseudo == nil {
			s.pseudo = make(map[string]index.Entry)
		}
		s.pseudo[e.Path] = e
	} else {
		s.res.Entries = append(s.res.Entries, e)
	}
	s.text += int64(len(e.Path) + len(e.Link))
	for _, x := range e.Xattrs {
		s.text += int64(len(x.Name) + len(x.Value))
	}
	if len(s.res.Entries)+len(s.pseudo) > index.MaxEntries || s.text > maxText || len(s.res.Extents) > maxExtents {
		return invalid(e.Path, errors.New("too many entries in one layer"))
	}
	return nil
}

// checkSize refuses files that no segment has room for, and sparse files whose
// fragments are not exactly what is stored.
func (s *scanner) checkSize(h *header) error {
	if h.size > index.MaxSegment-s.layout.Size() {
		return fmt.Errorf("content of %d bytes does not fit into an image", h.size)
	}
	if h.fragments == nil {
		return nil
	}
	stored := int64(0)
	for _, f := range h.fragments { // they do not overlap: no overflow
		stored += f.n
	}
	if stored != s.tar.left {
		return fmt.Errorf("sparse map of %d bytes for %d bytes of data", stored, s.tar.left)
	}
	return nil
}

// content writes a file to the segment and returns where.
func (s *scanner) content(h *header, path string) (int64, error) {
	off := s.layout.Place(h.size)
	if err := s.zerosTo(off); err != nil {
		return 0, err
	}
	if err := s.seg.Begin(path, h.size); err != nil {
		return 0, err
	}
	fragments := h.fragments
	if fragments == nil {
		fragments = []fragment{{0, h.size}}
	}
	for _, f := range fragments {
		if f.n == 0 {
			continue
		}
		if err := s.zerosTo(off + f.off); err != nil {
			return 0, err
		}
		s.res.Extents = append(s.res.Extents, index.Extent{Seg: s.at, Tar: s.tar.off, Len: f.n})
		n, err := s.seg.ReadFrom(io.LimitReader(&s.tar, f.n))
		if err != nil {
			return 0, err
		}
		if s.at += n; n != f.n {
			return 0, io.ErrUnexpectedEOF
		}
	}
	return off, nil
}

// zerosTo fills the segment up to offset off.
func (s *scanner) zerosTo(off int64) error {
	if off == s.at {
		return nil
	}
	n := off - s.at
	s.at = off
	return s.seg.WriteZeros(n)
}

// entry makes the entry for a header, but for where its content is. keep is
// false for what leaves no trace in the image.
func (s *scanner) entry(h *header) (e index.Entry, keep bool, err error) {
	p, err := Clean(h.name)
	if err != nil {
		return e, false, err
	}
	mark, p2, err := Mark(p)
	switch {
	case err != nil:
		return e, false, err
	case mark == WhiteoutMark:
		return index.Entry{Path: p2, Kind: index.Whiteout}, true, nil
	case mark == OpaqueMark:
		return index.Entry{Path: p2, Kind: index.Opaque}, true, nil
	case mark == IgnoredMark && (p[:min(len(p), len(linkDir))] != linkDir || kind(h.flag) != index.File):
		return e, false, nil
	}
	e = index.Entry{Path: p, Mode: uint16(h.mode & 0o7777), Sec: h.sec, Nsec: h.nsec}
	if e.Kind = kind(h.flag); e.Kind == 0 {
		return e, false, fmt.Errorf("entries of type %q are not supported", h.flag)
	}
	if err := s.attributes(&e, h); err != nil {
		return e, false, err
	}
	return e, true, nil
}

// kind is what an entry of a type becomes, 0 for types that layers do not have.
func kind(flag byte) index.Kind {
	switch flag {
	case typeFile, typeContiguous, typeSparse:
		return index.File
	case typeDir:
		return index.Dir
	case typeSymlink:
		return index.Symlink
	case typeHardlink:
		return index.Hardlink
	case typeChar:
		return index.Char
	case typeBlock:
		return index.Block
	case typeFifo:
		return index.Fifo
	}
	return 0
}

// attributes fills in what depends on the kind, and owner and xattrs.
func (s *scanner) attributes(e *index.Entry, h *header) error {
	var err error
	switch e.Kind {
	case index.File:
		e.Size = h.size
	case index.Symlink:
		e.Link = h.link
	case index.Hardlink:
		return s.hardlink(e, h.link)
	case index.Char, index.Block:
		e.Major, e.Minor, err = Device(h.major, h.minor)
	}
	if err != nil {
		return err
	}
	if e.UID, e.GID, err = Owner(h.uid, h.gid); err != nil {
		return err
	}
	e.Xattrs, err = Xattrs(h.pax)
	return err
}

// hardlink makes e a link, or a file if it is the first name of a file that
// aufs kept elsewhere.
func (s *scanner) hardlink(e *index.Entry, target string) error {
	link, err := Clean(target)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", shorten(target), err)
	}
	if link == e.Path || link == "" {
		return fmt.Errorf("hard link to itself or to the root")
	}
	if f, ok := s.pseudo[link]; ok {
		if f.Path != link { // linked before, under this name
			link = f.Path
		} else {
			name := e.Path
			f.Path = name
			*e = f
			s.pseudo[link] = f
			return nil
		}
	}
	*e = index.Entry{Path: e.Path, Kind: index.Hardlink, Link: link}
	return nil
}

// Owner checks user and group numbers: Linux has 32 bits, of which the highest
// value means nobody in particular.
func Owner(uid, gid int64) (uint32, uint32, error) {
	if uid < 0 || uid >= math.MaxUint32 || gid < 0 || gid >= math.MaxUint32 {
		return 0, 0, fmt.Errorf("owner %d:%d is out of range", uid, gid)
	}
	return uint32(uid), uint32(gid), nil
}

// Device checks device numbers: 12 and 20 bits in Linux.
func Device(major, minor int64) (uint32, uint32, error) {
	if major < 0 || major >= 1<<12 || minor < 0 || minor >= 1<<20 {
		return 0, 0, fmt.Errorf("device number %d:%d is out of range", major, minor)
	}
	return uint32(major), uint32(minor), nil
}

// invalid is the error for an entry that no layer may have.
func invalid(name string, err error) error {
	if !errdefs.IsInvalidArgument(err) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("tar entry %q: %w", shorten(name), err)
}

// shorten keeps hostile names out of logs.
func shorten(name string) string {
	if len(name) > index.MaxName {
		return name[:index.MaxName] + "…"
	}
	return name
}
