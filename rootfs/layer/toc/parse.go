package toc

import (
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// Format is how the blob of a TOC is made.
type Format struct {
	Codec index.Codec // of every piece
	// Marked says that some names are not the layer's but the format's (eStargz
	// and what descends from it): the TOC and the landmarks.
	Marked bool
}

// Names of the files that a marked format adds to a layer.
const (
	Name           = "stargz.index.json"
	prefetchMark   = ".prefetch.landmark"
	noPrefetchMark = ".no.prefetch.landmark"
)

// Parse makes a layer of a TOC's JSON. The data of the blob ends at byte end of
// it, where the TOC or the blob's own end is.
//
// Files that come before the prefetch landmark are the layer's Prefetch, unless
// there is the landmark that says no. Errors are ErrInvalidArgument and do not
// name the blob.
func Parse(json []byte, desc layer.Descriptor, end int64, format Format) (*index.Layer, error) {
	p := parser{format: format, end: end, links: map[string]string{}}
	p.layer.Blob, p.layer.BlobSize = desc.Digest, desc.Size
	p.layer.Access.Format = index.Chunked
	err := eachEntry(json, func(e *entry) error {
		if err := p.add(e); err != nil {
			return fmt.Errorf("entry %.255q: %w", e.Name, err)
		}
		return nil
	})
	if err == nil {
		err = p.finish()
	}
	if err != nil {
		return nil, fmt.Errorf("TOC: %w", Invalid(err))
	}
	return &p.layer, nil
}

// Invalid classes an error as ErrInvalidArgument: the layer is at fault.
func Invalid(err error) error {
	if errdefs.IsInvalidArgument(err) {
		return err
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
}

type parser struct {
	format Format
	layer  index.Layer
	layout index.Layout
	end    int64             // of the data in the blob
	text   int64             // bytes of strings kept
	zeros  int64             // bytes of zeros hashed
	links  map[string]string // names that are hard links now, and their targets
	file   file
	member member
	open   int // pieces from here on have no length yet

	prefetch   int64 // segment offset of the prefetch landmark
	noPrefetch bool
}

// file is the regular file whose chunks are being read.
type file struct {
	size   int64
	seen   int64 // bytes that chunks so far cover
	off    int64 // in the segment
	end    int64 // in the blob, of its last chunk; 0 if not known
	hidden bool  // not part of the layer: its chunks only bound others
}

// add takes in one entry.
func (p *parser) add(e *entry) error {
	if string(e.Type) == "chunk" {
		if p.file.seen == p.file.size {
			return errors.New("chunk of no file")
		}
		return p.chunk(e)
	}
	if err := p.endFile(); err != nil {
		return err
	}
	name, err := tarball.Clean(e.Name)
	if err != nil {
		return err
	}
	if err := p.name(e, name); err != nil {
		return err
	}
	if string(e.Type) != "reg" || e.Size == 0 {
		return nil
	}
	return p.chunk(e)
}

// name adds the entry of a name and starts its file.
func (p *parser) name(e *entry, name string) error {
	p.file = file{}
	if string(e.Type) == "reg" {
		if e.Size < 0 || e.Size > index.MaxSegment-p.layout.Size() {
			return fmt.Errorf("size of %d bytes", e.Size)
		}
		p.file = file{size: e.Size, end: e.EndOffset, hidden: true}
	}
	mark, about, err := tarball.Mark(name)
	switch {
	case err != nil:
		return err
	case p.format.Marked && p.landmark(name), mark == tarball.IgnoredMark:
		return nil
	case mark == tarball.WhiteoutMark:
		return p.keep(index.Entry{Path: about, Kind: index.Whiteout})
	case mark == tarball.OpaqueMark:
		return p.keep(index.Entry{Path: about, Kind: index.Opaque})
	}
	made, err := newEntry(e, name)
	if err != nil {
		return err
	}
	if made.Kind == index.File {
		made.Size, made.Off = e.Size, p.layout.Place(e.Size)
		p.file = file{size: e.Size, off: made.Off, end: e.EndOffset}
	}
	return p.keep(made)
}

// landmark notes what a name that is the format's means.
func (p *parser) landmark(name string) bool {
	switch name {
	case Name:
	case prefetchMark:
		p.prefetch = p.layout.Size()
	case noPrefetchMark:
		p.noPrefetch = true
	default:
		return false
	}
	return true
}

// keep adds an entry to the layer.
func (p *parser) keep(e index.Entry) error {
	if err := e.Validate(index.MaxSegment); err != nil {
		return err
	}
	p.text += int64(len(e.Path) + len(e.Link))
	for _, x := range e.Xattrs {
		p.text += int64(len(x.Name) + len(x.Value))
	}
	if p.text > maxText {
		return errors.New("too many names and attributes in one layer")
	}
	if e.Kind == index.Hardlink {
		p.links[e.Path] = e.Link
	} else {
		delete(p.links, e.Path)
	}
	p.layer.Entries = append(p.layer.Entries, e)
	return nil
}

// kind is the Kind for a type, 0 for none.
func kind(typ []byte) index.Kind {
	switch string(typ) {
	case "reg":
		return index.File
	case "dir":
		return index.Dir
	case "symlink":
		return index.Symlink
	case "hardlink":
		return index.Hardlink
	case "char":
		return index.Char
	case "block":
		return index.Block
	case "fifo":
		return index.Fifo
	}
	return 0
}

// newEntry makes the entry for a name, without its content.
func newEntry(e *entry, name string) (index.Entry, error) {
	made := index.Entry{Path: name, Kind: kind(e.Type), Mode: uint16(e.Mode & 0o7777)}
	var err error
	switch made.Kind {
	case 0:
		return made, fmt.Errorf("unknown type %.32q", e.Type)
	case index.Hardlink:
		return link(e, name)
	case index.Symlink:
		made.Link = e.LinkName
	case index.Char, index.Block:
		made.Major, made.Minor, err = tarball.Device(e.DevMajor, e.DevMinor)
	}
	if err != nil {
		return made, err
	}
	if made.UID, made.GID, err = tarball.Owner(e.UID, e.GID); err != nil {
		return made, err
	}
	if len(e.ModTime) > 0 {
		var t time.Time
		if err := t.UnmarshalText(e.ModTime); err != nil {
			return made, fmt.Errorf("modification time: %w", err)
		}
		made.Sec, made.Nsec = t.Unix(), uint32(t.Nanosecond())
	}
	made.Xattrs = xattrs(e)
	return made, nil
}

func xattrs(e *entry) []index.Xattr {
	var list []index.Xattr
	for name, value := range e.Xattrs {
		if tarball.KeepXattr(name) {
			list = append(list, index.Xattr{Name: name, Value: string(value)})
		}
	}
	index.SortXattrs(list)
	return list
}

func link(e *entry, name string) (index.Entry, error) {
	target, err := tarball.Clean(e.LinkName)
	if err != nil {
		return index.Entry{}, fmt.Errorf("hard link to %.255q: %w", e.LinkName, err)
	}
	return index.Entry{Path: name, Kind: index.Hardlink, Link: target}, nil
}

// finish checks what only the whole TOC shows.
func (p *parser) finish() error {
	if err := p.endFile(); err != nil {
		return err
	}
	p.endMember(p.end)
	p.layer.Table.Size = p.layout.Size()
	if p.prefetch > 0 && !p.noPrefetch {
		p.layer.Prefetch = []index.Range{{Len: p.prefetch}}
	}
	return p.checkLinks()
}

// checkLinks refuses hard links that lead around in a circle.
func (p *parser) checkLinks() error {
	done := make(map[string]bool, len(p.links))
	for name := range p.links {
		var way []string
		at := map[string]bool{}
		for target, ok := name, true; ok && !done[target]; target, ok = p.links[target], p.links[target] != "" {
			if at[target] {
				return fmt.Errorf("hard link %.255q leads to itself", target)
			}
			at[target] = true
			way = append(way, target)
		}
		for _, n := range way {
			done[n] = true
		}
	}
	return nil
}
