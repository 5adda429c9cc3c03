package convert

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"hash/crc64"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// tarSplit collects what makes the tar again out of its files: a stream of JSON
// objects (vbatts/tar-split, tar/storage), compressed with zstd. podman takes
// each header from one segment, with the padding before it, and ignores what
// follows the last entry as long as it is zeros.
type tarSplit struct {
	packed bytes.Buffer
	z      *zstd.Encoder
	enc    *json.Encoder
	plain  counter
	pos    int
	crc    uint64
}

// counter counts what goes to the encoder.
type counter struct {
	w *zstd.Encoder
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// splitEntry is one object: a segment of the tar, or the name of a file with
// its size and, in Payload, checksum.
type splitEntry struct {
	Type     int    `json:"type"`
	Name     string `json:"name,omitempty"`
	Size     int64  `json:"size,omitempty"`
	Payload  []byte `json:"payload"`
	Position int    `json:"position"`
}

const (
	splitFile    = 1
	splitSegment = 2
)

func newTarSplit(level int) (*tarSplit, error) {
	s := &tarSplit{}
	var err error
	// One goroutine: the encoder's others would make blocks as they come.
	s.z, err = zstd.NewWriter(&s.packed, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	s.plain.w = s.z
	s.enc = json.NewEncoder(&s.plain)
	return s, nil
}

func (s *tarSplit) put(e splitEntry) error {
	e.Position = s.pos
	s.pos++
	return s.enc.Encode(e)
}

// part takes in the next part of the tar, which p describes.
func (s *tarSplit) part(p *part, data []byte) error {
	if p.kind == chunkPart {
		return s.chunk(p, data)
	}
	if err := s.put(splitEntry{Type: splitSegment, Payload: data}); err != nil || p.kind != headerPart || p.file.size > 0 {
		return err
	}
	return s.put(splitEntry{Type: splitFile, Name: p.file.entry.Name})
}

// chunk adds a file when its last chunk was seen.
func (s *tarSplit) chunk(p *part, data []byte) error {
	if p.entry == p.file.entry { // the first one
		s.crc = 0
	}
	if p.whole() {
		s.crc = p.crc
	} else {
		s.crc = crc64.Update(s.crc, crcTable, data)
	}
	if p.file.left > 0 {
		return nil
	}
	sum := binary.BigEndian.AppendUint64(nil, s.crc)
	return s.put(splitEntry{Type: splitFile, Name: p.file.entry.Name, Size: p.file.size, Payload: sum})
}

// close returns the compressed data.
func (s *tarSplit) close() ([]byte, error) {
	err := s.z.Close()
	return s.packed.Bytes(), err
}

// splitCheck finds out whether podman would take the tar-split data of a tar. A
// layer with such data that it does not take cannot be pulled at all; without
// them podman pulls the whole layer, as any other one.
type splitCheck struct {
	names map[string]struct{}
	bad   bool
}

// see looks at the header of an entry. podman takes no name twice, no types
// beside those of its TOC, attributes in records of the one form only, and no
// sizes of what has no data.
func (c *splitCheck) see(h *tar.Header) {
	name, _ := tarball.Clean(h.Name)
	if c.names == nil {
		c.names = make(map[string]struct{})
	}
	_, twice := c.names[name]
	c.names[name] = struct{}{}
	c.bad = c.bad || twice || h.Size != dataSize(h) || h.Typeflag == tar.TypeCont || h.Typeflag == tar.TypeXGlobalHeader
	for k := range h.PAXRecords {
		c.bad = c.bad || strings.HasPrefix(k, "LIBARCHIVE.xattr.")
	}
}

// end looks at what follows the last entry.
func (c *splitCheck) end(p []byte) {
	for _, b := range p {
		c.bad = c.bad || b != 0
	}
}

// sum is the digest of compressed data.
func sum(p []byte) string { return digest.FromBytes(p).String() }
