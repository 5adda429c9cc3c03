package soci

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// Fields of the tables FileMetadata and Xattr.
const (
	fileName     = 0
	fileType     = 1
	fileOffset   = 2
	fileSize     = 3
	fileLink     = 4
	fileMode     = 5
	fileUID      = 6
	fileGID      = 7
	fileModTime  = 10
	fileDevMajor = 11
	fileDevMinor = 12
	fileRecords  = 13
	recordKey    = 0
	recordValue  = 1
)

// sparseRecords begin the names of the pax records of sparse files.
const sparseRecords = "GNU.sparse."

// kinds are the types of files.
var kinds = map[string]index.Kind{
	"reg":      index.File,
	"dir":      index.Dir,
	"symlink":  index.Symlink,
	"hardlink": index.Hardlink,
	"char":     index.Char,
	"block":    index.Block,
	"fifo":     index.Fifo,
}

// entry takes in the FileMetadata at a position.
func (p *parser) entry(at int64) error {
	t := p.buf.table(at)
	raw := t.text(fileName)
	if err := p.add(t, raw); err != nil {
		return fmt.Errorf("entry %.255q: %w", raw, err)
	}
	return nil
}

// add takes in one entry by its name in the tar.
func (p *parser) add(t table, raw string) error {
	if len(p.layer.Entries) >= index.MaxEntries {
		return errors.New("too many entries in one layer")
	}
	name, err := tarball.Clean(raw)
	if err != nil {
		return err
	}
	kind, ok := kinds[t.text(fileType)]
	if !ok {
		return fmt.Errorf("unknown type %.32q", t.text(fileType))
	}
	off, size, err := p.place(t, kind)
	if err != nil {
		return err
	}
	mark, about, err := tarball.Mark(name)
	switch {
	case err != nil:
		return err
	case mark == tarball.IgnoredMark:
		return nil
	case mark == tarball.WhiteoutMark:
		p.keep(index.Entry{Path: about, Kind: index.Whiteout})
		return nil
	case mark == tarball.OpaqueMark:
		p.keep(index.Entry{Path: about, Kind: index.Opaque})
		return nil
	}
	e := index.Entry{Path: name, Kind: kind}
	if err := attributes(t, &e); err != nil {
		return err
	}
	if kind == index.File {
		e.Size, e.Off = size, p.content(off, size)
	}
	p.keep(e)
	return nil
}

func (p *parser) keep(e index.Entry) { p.layer.Entries = append(p.layer.Entries, e) }

// place checks where an entry's data is in the tar. Entries are in the order of
// the tar. Only files have data, whatever size a link has in the header.
func (p *parser) place(t table, kind index.Kind) (off, size int64, err error) {
	off = t.long(fileOffset)
	if kind == index.File {
		size = t.long(fileSize)
	}
	if off < p.end || off > p.size || size < 0 || size > p.size-off {
		return 0, 0, fmt.Errorf("data at %d, %d bytes, is not between %d, where the entry before ends, and %d", off, size, p.end, p.size)
	}
	if p.data += size; p.data > maxData {
		return 0, 0, fmt.Errorf("files of more than %d bytes", int64(maxData))
	}
	p.end = off + size
	return off, size, nil
}

// content gives a file its place in the segment, and returns it.
func (p *parser) content(tar, size int64) int64 {
	if size == 0 {
		return 0
	}
	off := p.layout.Place(size)
	p.layer.Access.Extents = append(p.layer.Access.Extents, index.Extent{Seg: off, Tar: tar, Len: size})
	p.cut(off, size)
	return off
}

// cut makes chunks of a file. A small one goes into the chunk before, with the
// zeros between, if both fit into a unit.
func (p *parser) cut(off, size int64) {
	chunks := p.layer.Table.Chunks
	if n := len(chunks); n > 0 && off+size-chunks[n-1].Off <= index.UnitSize {
		chunks[n-1].Len = off + size - chunks[n-1].Off
		return
	}
	for end := off + size; off < end; off += index.UnitSize {
		chunks = append(chunks, index.Chunk{Off: off, Len: min(index.UnitSize, end-off)})
	}
	p.layer.Table.Chunks = chunks
}

// attributes reads what an entry says besides its content.
func attributes(t table, e *index.Entry) error {
	records, err := paxRecords(t)
	if err != nil {
		return err
	}
	if e.Kind == index.Hardlink {
		return hardlink(t, e)
	}
	if err := modTime(t, e); err != nil {
		return err
	}
	e.Mode = uint16(t.long(fileMode) & 0o7777)
	if e.UID, e.GID, err = tarball.Owner(int64(t.uint(fileUID)), int64(t.uint(fileGID))); err != nil {
		return err
	}
	switch e.Kind {
	case index.Symlink:
		e.Link = t.text(fileLink)
	case index.Char, index.Block:
		if e.Major, e.Minor, err = tarball.Device(t.long(fileDevMajor), t.long(fileDevMinor)); err != nil {
			return err
		}
	}
	e.Xattrs, err = tarball.Xattrs(records)
	return err
}

// hardlink reads the target of a hard link. The files that aufs keeps for hard
// links are no part of a layer, so links to them lead nowhere.
func hardlink(t table, e *index.Entry) error {
	target := t.text(fileLink)
	link, err := tarball.Clean(target)
	if err != nil {
		return fmt.Errorf("hard link to %.255q: %w", target, err)
	}
	mark, _, err := tarball.Mark(link)
	if err != nil || mark != tarball.NoMarker || link == e.Path || link == "" {
		return fmt.Errorf("hard link to %.255q", target)
	}
	e.Link = link
	return nil
}

// modTime reads the modification time, RFC 3339. Writers leave it empty when
// its year has no four digits.
func modTime(t table, e *index.Entry) error {
	text := t.text(fileModTime)
	if text == "" {
		return nil
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return fmt.Errorf("modification time %.40q", text)
	}
	e.Sec, e.Nsec = at.Unix(), uint32(at.Nanosecond())
	return nil
}

// paxRecords reads the pax records of an entry, which the schema calls xattrs.
// Sparse files are refused: of them a ztoc tells the size, but not which parts
// are stored.
func paxRecords(t table) (map[string]string, error) {
	records := make(map[string]string)
	err := t.each(fileRecords, func(at int64) error {
		r := t.b.table(at)
		key := r.text(recordKey)
		if strings.HasPrefix(key, sparseRecords) {
			return errors.New("sparse files in a layer with a ztoc are not supported")
		}
		records[key] = r.text(recordValue)
		return nil
	})
	return records, err
}
