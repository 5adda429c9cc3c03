package toc

import (
	"encoding/json"
	"errors"
	"fmt"
)

const version = 1

// entry is one element of a TOC, a name or a further chunk of a file.
// Its byte slices are parts of the TOC.
type entry struct {
	Name     string
	Type     []byte // dir, reg, symlink, hardlink, char, block, fifo; or chunk
	Size     int64
	ModTime  []byte // RFC 3339, or empty
	LinkName string
	Mode     int64 // as in a tar header
	UID      int64
	GID      int64
	DevMajor int64
	DevMinor int64

	Xattrs map[string][]byte

	Digest      []byte // of the file
	Offset      int64  // of the gzip member or zstd frame in the blob
	EndOffset   int64  // in the blob, behind the frame of the file's last chunk; 0: not known
	InnerOffset int64  // of the chunk in the plain bytes of the member
	ChunkOffset int64  // of the chunk in the file
	ChunkSize   int64  // 0: to the end of the file
	ChunkDigest []byte // of the plain chunk
	ChunkType   []byte // "zeros", or empty
}

// field reads the value of a key. Keys that say nothing that is needed, such
// as userName, are skipped.
func (e *entry) field(s *scanner, key []byte) (err error) {
	switch string(key) {
	case "name":
		e.Name, err = copied(s.text())
	case "type":
		e.Type, err = s.text()
	case "size":
		e.Size, err = s.number()
	case "modtime":
		e.ModTime, err = s.text()
	case "linkName":
		e.LinkName, err = copied(s.text())
	case "mode":
		e.Mode, err = s.number()
	case "uid":
		e.UID, err = s.number()
	case "gid":
		e.GID, err = s.number()
	case "devMajor":
		e.DevMajor, err = s.number()
	case "devMinor":
		e.DevMinor, err = s.number()
	case "digest":
		e.Digest, err = s.text()
	case "offset":
		e.Offset, err = s.number()
	case "endOffset":
		e.EndOffset, err = s.number()
	case "innerOffset":
		e.InnerOffset, err = s.number()
	case "chunkOffset":
		e.ChunkOffset, err = s.number()
	case "chunkSize":
		e.ChunkSize, err = s.number()
	case "chunkDigest":
		e.ChunkDigest, err = s.text()
	case "chunkType":
		e.ChunkType, err = s.text()
	case "xattrs":
		var v []byte
		if v, err = s.value(); err == nil {
			err = json.Unmarshal(v, &e.Xattrs)
		}
	default:
		_, err = s.value()
	}
	return err
}

func copied(b []byte, err error) (string, error) { return string(b), err }

// eachEntry decodes a TOC and calls f for one entry after the other, so that
// they do not all have to be in memory at their largest. f must not keep e.
func eachEntry(toc []byte, f func(e *entry) error) error {
	s := &scanner{data: toc}
	got, seen := int64(0), false
	err := s.object(func(key []byte) (err error) {
		switch string(key) {
		case "version":
			got, err = s.number()
		case "entries":
			if seen {
				return errors.New("two lists of entries")
			}
			seen = true
			err = s.entries(f)
		default:
			_, err = s.value()
		}
		return err
	})
	switch {
	case err != nil:
		return err
	case got != version || !seen:
		return fmt.Errorf("TOC of version %d, which is not supported", got)
	case s.peek() != 0 || s.pos != len(toc):
		return s.fail("data behind the TOC")
	}
	return nil
}

// entries decodes the list of entries. A maker in Go writes null for none.
func (s *scanner) entries(f func(e *entry) error) error {
	if s.null() {
		return nil
	}
	n := 0
	return s.each('[', ']', func() error {
		if n++; n > maxEntries {
			return errors.New("too many entries")
		}
		var e entry
		if err := s.object(func(key []byte) error { return e.field(s, key) }); err != nil {
			return err
		}
		return f(&e)
	})
}
