package estargz

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// parse makes a layer of a TOC that begins at byte end of the blob.
func parse(toc []byte, desc layer.Descriptor, end int64) (*index.Layer, error) {
	p := parser{end: end, links: map[string]string{}}
	p.layer.Blob, p.layer.BlobSize = desc.Digest, desc.Size
	p.layer.Access.Format = index.Chunked
	err := eachEntry(toc, func(e *tocEntry) error {
		if err := p.add(e); err != nil {
			return fmt.Errorf("entry %.255q: %w", e.Name, err)
		}
		return nil
	})
	if err == nil {
		err = p.finish()
	}
	if err != nil {
		return nil, fmt.Errorf("TOC: %w", invalid(err))
	}
	return &p.layer, nil
}

type parser struct {
	layer  index.Layer
	layout index.Layout
	end    int64             // of the last member in the blob
	text   int64             // bytes of strings kept
	links  map[string]string // names that are hard links now, and their targets
	file   file
	member member
	open   int // pieces from here on have no length yet
}

// file is the regular file whose chunks are being read.
type file struct {
	size   int64
	seen   int64 // bytes that chunks so far cover
	off    int64 // in the segment
	hidden bool  // not part of the layer: its chunks only bound others
}

// member is the gzip member of the latest chunk.
type member struct {
	off   int64
	inner int64 // end of that chunk in the inflated member
	any   bool
}

// add takes in one entry.
func (p *parser) add(e *tocEntry) error {
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
func (p *parser) name(e *tocEntry, name string) error {
	p.file = file{}
	if string(e.Type) == "reg" {
		if e.Size < 0 || e.Size > index.MaxSegment-p.layout.Size() {
			return fmt.Errorf("size of %d bytes", e.Size)
		}
		p.file = file{size: e.Size, hidden: true}
	}
	mark, about, err := tarball.Mark(name)
	switch {
	case err != nil:
		return err
	case name == tocName || name == prefetchMark || name == noPrefetchMark || mark == tarball.IgnoredMark:
		return nil
	case mark == tarball.WhiteoutMark:
		return p.keep(index.Entry{Path: about, Kind: index.Whiteout})
	case mark == tarball.OpaqueMark:
		return p.keep(index.Entry{Path: about, Kind: index.Opaque})
	}
	entry, err := newEntry(e, name)
	if err != nil {
		return err
	}
	if entry.Kind == index.File {
		entry.Size, entry.Off = e.Size, p.layout.Place(e.Size)
		p.file = file{size: e.Size, off: entry.Off}
	}
	return p.keep(entry)
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
func newEntry(e *tocEntry, name string) (index.Entry, error) {
	entry := index.Entry{Path: name, Kind: kind(e.Type), Mode: uint16(e.Mode & 0o7777)}
	var err error
	switch entry.Kind {
	case 0:
		return entry, fmt.Errorf("unknown type %.32q", e.Type)
	case index.Hardlink:
		return link(e, name)
	case index.Symlink:
		entry.Link = e.LinkName
	case index.Char, index.Block:
		entry.Major, entry.Minor, err = tarball.Device(e.DevMajor, e.DevMinor)
	}
	if err != nil {
		return entry, err
	}
	if entry.UID, entry.GID, err = tarball.Owner(e.UID, e.GID); err != nil {
		return entry, err
	}
	if len(e.ModTime) > 0 {
		var t time.Time
		if err := t.UnmarshalText(e.ModTime); err != nil {
			return entry, fmt.Errorf("modification time: %w", err)
		}
		entry.Sec, entry.Nsec = t.Unix(), uint32(t.Nanosecond())
	}
	entry.Xattrs = xattrs(e)
	return entry, nil
}

func xattrs(e *tocEntry) []index.Xattr {
	var list []index.Xattr
	for name, value := range e.Xattrs {
		if tarball.KeepXattr(name) {
			list = append(list, index.Xattr{Name: name, Value: string(value)})
		}
	}
	index.SortXattrs(list)
	return list
}

func link(e *tocEntry, name string) (index.Entry, error) {
	target, err := tarball.Clean(e.LinkName)
	if err != nil {
		return index.Entry{}, fmt.Errorf("hard link to %.255q: %w", e.LinkName, err)
	}
	return index.Entry{Path: name, Kind: index.Hardlink, Link: target}, nil
}

// chunk adds the chunk that e describes to the current file.
func (p *parser) chunk(e *tocEntry) error {
	f := &p.file
	n := e.ChunkSize
	if n == 0 {
		n = f.size - f.seen
	}
	if e.ChunkOffset != f.seen || n <= 0 || n > f.size-f.seen {
		return fmt.Errorf("chunk %d+%d does not follow the %d bytes before it in a file of %d",
			e.ChunkOffset, n, f.seen, f.size)
	}
	if err := p.place(e, n); err != nil {
		return err
	}
	start := f.off + f.seen
	f.seen += n
	if f.hidden {
		return nil
	}
	if n > index.MaxChunk {
		return fmt.Errorf("chunk of %d bytes; convert the image with chunks of up to %d bytes", n, index.MaxChunk)
	}
	digest := e.ChunkDigest
	if len(digest) == 0 && n == f.size {
		digest = e.Digest
	}
	sum, err := parseSum(digest)
	if err != nil {
		return err
	}
	p.layer.Table.Chunks = append(p.layer.Table.Chunks, index.Chunk{Off: start, Len: n, Sum: sum})
	p.layer.Access.Pieces = append(p.layer.Access.Pieces, index.Piece{Off: e.Offset, Inner: e.InnerOffset, Codec: index.GzipMember})
	return nil
}

// place checks where a chunk lies in the blob. Members come by rising offset,
// and chunks in them too; each member ends where the next one begins.
func (p *parser) place(e *tocEntry, n int64) error {
	m := &p.member
	if e.Offset < 0 || e.Offset >= p.end || e.InnerOffset < 0 || e.InnerOffset > maxInner {
		return fmt.Errorf("chunk at byte %d, %d in it, of %d", e.Offset, e.InnerOffset, p.end)
	}
	switch {
	case m.any && e.Offset < m.off, m.any && e.Offset == m.off && e.InnerOffset < m.inner:
		return fmt.Errorf("chunk at byte %d, %d in it, overlaps the one before", e.Offset, e.InnerOffset)
	case m.any && e.Offset > m.off:
		p.endMember(e.Offset)
	}
	*m = member{off: e.Offset, inner: e.InnerOffset + n, any: true}
	return nil
}

// endMember gives the pieces of the latest member their length.
func (p *parser) endMember(end int64) {
	pieces := p.layer.Access.Pieces
	for ; p.open < len(pieces); p.open++ {
		pieces[p.open].Len = end - pieces[p.open].Off
	}
}

// parseSum reads "sha256:" and 64 hexadecimal digits.
func parseSum(s []byte) (index.Sum, error) {
	var sum index.Sum
	digits, ok := bytes.CutPrefix(s, []byte("sha256:"))
	if !ok || len(digits) != hex.EncodedLen(len(sum)) {
		return sum, fmt.Errorf("chunk digest %.80q is not SHA-256", s)
	}
	_, err := hex.Decode(sum[:], digits)
	return sum, err
}

// endFile checks that the chunks of the last file cover it.
func (p *parser) endFile() error {
	if p.file.seen != p.file.size {
		return fmt.Errorf("chunks of the file before cover %d of its %d bytes", p.file.seen, p.file.size)
	}
	return nil
}

// finish checks what only the whole TOC shows.
func (p *parser) finish() error {
	if err := p.endFile(); err != nil {
		return err
	}
	p.endMember(p.end)
	p.layer.Table.Size = p.layout.Size()
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
