package convert

import (
	"archive/tar"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// Names of files that stargz-snapshotter's formats add to a layer, in its root.
const (
	tocName        = "stargz.index.json"
	prefetchMark   = ".prefetch.landmark"
	noPrefetchMark = ".no.prefetch.landmark"
	markContent    = "\x0f"
)

// isMark recognises them.
func isMark(path string) bool {
	return path == tocName || path == prefetchMark || path == noPrefetchMark
}

// tocEntry is an element of a TOC: a name, or a further chunk of a file. All
// dialects have the same fields with the same meaning, where they have them.
type tocEntry struct {
	Type       string            `json:"type"`
	Name       string            `json:"name"`
	LinkName   string            `json:"linkName,omitempty"`
	Mode       int64             `json:"mode,omitempty"` // as in the tar
	Size       int64             `json:"size,omitempty"`
	UID        int               `json:"uid,omitempty"`
	GID        int               `json:"gid,omitempty"`
	ModTime    *time.Time        `json:"modtime,omitempty"`
	AccessTime *time.Time        `json:"accesstime,omitempty"`
	ChangeTime *time.Time        `json:"changetime,omitempty"`
	DevMajor   int64             `json:"devMajor,omitempty"`
	DevMinor   int64             `json:"devMinor,omitempty"`
	Xattrs     map[string][]byte `json:"xattrs,omitempty"`

	Digest      string `json:"digest,omitempty"`      // of the file
	Offset      int64  `json:"offset,omitempty"`      // of the member in the blob
	EndOffset   int64  `json:"endOffset,omitempty"`   // of the file's last member; ZstdChunked
	InnerOffset int64  `json:"innerOffset,omitempty"` // of the chunk in the plain member
	ChunkOffset int64  `json:"chunkOffset,omitempty"` // of the chunk in the file
	ChunkSize   int64  `json:"chunkSize,omitempty"`
	ChunkDigest string `json:"chunkDigest,omitempty"`
	ChunkType   string `json:"chunkType,omitempty"`
}

// toc is what is stored of them.
type toc struct {
	Version        int         `json:"version"` // 1
	Entries        []*tocEntry `json:"entries"`
	TarSplitDigest string      `json:"tarSplitDigest,omitempty"`
}

// Values of tocEntry.Type and ChunkType.
const (
	typeReg    = "reg"
	typeChunk  = "chunk"
	chunkZeros = "zeros"
)

var tocTypes = map[byte]string{
	tar.TypeReg: typeReg, tar.TypeCont: typeReg, tar.TypeLink: "hardlink", tar.TypeSymlink: "symlink",
	tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeDir: "dir", tar.TypeFifo: "fifo",
}

// newEntry makes the TOC's entry for a header. It refuses what readers of a TOC
// could not take for what the tar says.
func newEntry(h *tar.Header) (*tocEntry, error) {
	typ, ok := tocTypes[h.Typeflag]
	if !ok {
		return nil, fmt.Errorf("entries of type %q are not supported", h.Typeflag)
	}
	if !utf8.ValidString(h.Name) || !utf8.ValidString(h.Linkname) {
		return nil, errors.New("a TOC is JSON and cannot hold names that are not UTF-8; rename it, or leave the layer as it is")
	}
	if _, err := tarball.Clean(h.Name); err != nil {
		return nil, err
	}
	if h.Typeflag == tar.TypeLink {
		if _, err := tarball.Clean(h.Linkname); err != nil {
			return nil, fmt.Errorf("hard link to %.255q: %w", h.Linkname, err)
		}
	}
	if _, _, err := tarball.Owner(int64(h.Uid), int64(h.Gid)); err != nil {
		return nil, err
	}
	e := &tocEntry{Type: typ, Name: h.Name, LinkName: h.Linkname, Mode: h.Mode, Size: h.Size, UID: h.Uid, GID: h.Gid}
	return e, e.details(h)
}

// details fills in what takes more than a copy.
func (e *tocEntry) details(h *tar.Header) error {
	e.DevMajor, e.DevMinor = h.Devmajor, h.Devminor
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		if _, _, err := tarball.Device(h.Devmajor, h.Devminor); err != nil {
			return err
		}
	}
	for _, t := range []struct {
		from time.Time
		to   **time.Time
	}{{h.ModTime, &e.ModTime}, {h.AccessTime, &e.AccessTime}, {h.ChangeTime, &e.ChangeTime}} {
		if t.from.IsZero() {
			continue
		}
		utc := t.from.UTC()
		if y := utc.Year(); y < 0 || y > 9999 {
			return fmt.Errorf("a TOC cannot hold times of the year %d", y)
		}
		*t.to = &utc
	}
	return e.attributes(h.PAXRecords)
}

// attributes collects extended attributes. Those that only bsdtar's records
// have count if Linux knows them.
func (e *tocEntry) attributes(records map[string]string) error {
	list, err := tarball.Xattrs(records)
	if err != nil || len(records) == 0 {
		return err
	}
	e.Xattrs = make(map[string][]byte)
	for _, x := range list {
		e.Xattrs[x.Name] = []byte(x.Value)
	}
	for k, v := range records {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			e.Xattrs[name] = []byte(v)
		}
	}
	for name := range e.Xattrs {
		if !utf8.ValidString(name) {
			return fmt.Errorf("a TOC cannot hold the attribute %.255q, which is not UTF-8", name)
		}
	}
	return nil
}
