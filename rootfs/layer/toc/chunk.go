package toc

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// member is the gzip member or zstd frame of the latest chunk.
type member struct {
	off   int64
	inner int64 // end of that chunk in the member's plain bytes
	any   bool
}

// chunk adds the chunk that e describes to the current file.
func (p *parser) chunk(e *entry) error {
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
	if !f.hidden {
		if err := p.content(e, n); err != nil {
			return err
		}
	}
	f.seen += n
	if f.seen == f.size && f.end != 0 {
		return p.endData(f.end)
	}
	return nil
}

// place checks where a chunk lies in the blob. Members come by rising offset,
// and chunks in them too; each member ends where the next one begins.
func (p *parser) place(e *entry, n int64) error {
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

// content adds the next n bytes of the current file to the table. Zeros need no
// chunk.
func (p *parser) content(e *entry, n int64) error {
	switch string(e.ChunkType) {
	case "":
	case "zeros":
		return nil
	default:
		return fmt.Errorf("unknown type of chunk %.32q", e.ChunkType)
	}
	digest := e.ChunkDigest
	if len(digest) == 0 && n == p.file.size {
		digest = e.Digest
	}
	sum, err := parseSum(digest)
	if err != nil {
		return err
	}
	if n > index.MaxChunk {
		return p.large(sum, n)
	}
	p.layer.Table.Chunks = append(p.layer.Table.Chunks, index.Chunk{Off: p.file.off + p.file.seen, Len: n, Sum: sum})
	p.layer.Access.Pieces = append(p.layer.Access.Pieces, index.Piece{Off: e.Offset, Inner: e.InnerOffset, Codec: p.format.Codec})
	return nil
}

// large accepts a chunk of more than index.MaxChunk bytes if it is nothing but
// zeros: podman makes one chunk of a whole file of zeros, and does not say so.
func (p *parser) large(sum index.Sum, n int64) error {
	if n <= maxZeros-p.zeros {
		p.zeros += n
		if zeroSum(n) == sum {
			return nil
		}
	}
	return fmt.Errorf("chunk of %d bytes; convert the image with chunks of up to %d bytes", n, index.MaxChunk)
}

// zeroSum is the digest of n zero bytes.
func zeroSum(n int64) index.Sum {
	h, zeros := sha256.New(), make([]byte, 64<<10)
	for ; n > 0; n -= int64(len(zeros)) {
		h.Write(zeros[:min(n, int64(len(zeros)))])
	}
	return index.Sum(h.Sum(nil))
}

// endMember gives the pieces of the latest member their length.
func (p *parser) endMember(end int64) {
	pieces := p.layer.Access.Pieces
	for ; p.open < len(pieces); p.open++ {
		pieces[p.open].Len = end - pieces[p.open].Off
	}
}

// endData ends the latest member where the TOC says that it does.
func (p *parser) endData(end int64) error {
	if end <= p.member.off || end > p.end {
		return fmt.Errorf("last chunk, at byte %d of %d, ends at byte %d", p.member.off, p.end, end)
	}
	p.endMember(end)
	p.member = member{off: end, any: true}
	return nil
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
