package convert

import (
	"crypto/sha256"
	"hash/crc64"
)

// member is a run of the plain tar that is compressed by itself, as a gzip
// member or a zstd frame. It goes from the packer, which fills it, to a worker,
// which compresses it, to the writer, and back.
type member struct {
	plain  []byte
	parts  []part // of plain, in order and without gaps
	packed []byte
	done   chan struct{} // has room for one: packed is there
}

// part is a run of a member.
type part struct {
	kind  partKind
	n     int       // bytes
	file  *file     // whose header or chunk it is
	entry *tocEntry // of the chunk
	sum   [sha256.Size]byte
	crc   uint64
}

type partKind uint8

const (
	headerPart partKind = iota + 1 // of a file, with the padding before it
	chunkPart                      // of a file
	otherPart                      // of the tar
)

// file is an entry of the tar on its way, of any type.
type file struct {
	entry *tocEntry
	size  int64 // of its data, bytes
	left  int64 // of that, not written yet
}

// whole tells whether a chunk is all of its file.
func (p *part) whole() bool { return int64(p.n) == p.file.size }

var crcTable = crc64.MakeTable(crc64.ISO) // tar-split's

// pack does what can be done for a member without the ones before it.
func (m *member) pack(c codec, crc bool) (err error) {
	off := 0
	for i := range m.parts {
		p := &m.parts[i]
		data := m.plain[off : off+p.n]
		off += p.n
		if p.kind != chunkPart {
			continue
		}
		p.sum = sha256.Sum256(data)
		if crc && p.whole() {
			p.crc = crc64.Checksum(data, crcTable)
		}
	}
	m.packed, err = c.pack(m.packed[:0], m.plain)
	return err
}

func (m *member) reset() {
	clear(m.parts)
	m.plain, m.parts, m.packed = m.plain[:0], m.parts[:0], m.packed[:0]
}
