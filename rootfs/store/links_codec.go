package store

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// linkFile is the content of a .links file.
type linkFile struct {
	chunks  int // of the segment
	targets []linkTarget
}

type linkTarget struct {
	id    index.ID
	pairs []linkPair
}

// linkPair says that a chunk of the segment is the same as one of the target.
type linkPair struct{ chunk, target uint32 }

// The links file, little-endian: magic, version and flags (4 bytes each, flags
// 0), number of chunks of the segment and number of targets (4 bytes each); for
// each target the SHA-256 that its id is, the number of pairs and the pairs, by
// rising chunk (4 bytes each); and a CRC-32C over all before it.
const (
	linksMagic   = "TATAMI\x00L"
	linksVersion = 1
	linksHeader  = len(linksMagic) + 4 + 4 + 4 + 4
	linksTarget  = 32 + 4
	linksPair    = 8
)

func encodeLinks(f *linkFile) ([]byte, error) {
	le := binary.LittleEndian
	out := append([]byte{}, linksMagic...)
	out = le.AppendUint32(out, linksVersion)
	out = le.AppendUint32(out, 0)
	out = le.AppendUint32(out, uint32(f.chunks))
	out = le.AppendUint32(out, uint32(len(f.targets)))
	for _, t := range f.targets {
		sum, err := hex.DecodeString(t.id.Encoded())
		if err != nil || len(sum) != 32 {
			return nil, fmt.Errorf("encode links to segment %s: %w", t.id, errdefs.ErrInvalidArgument)
		}
		out = append(out, sum...)
		out = le.AppendUint32(out, uint32(len(t.pairs)))
		for _, p := range t.pairs {
			out = le.AppendUint32(out, p.chunk)
			out = le.AppendUint32(out, p.target)
		}
	}
	return le.AppendUint32(out, crc32.Checksum(out, crc32.MakeTable(crc32.Castagnoli))), nil
}

// decodeLinks decodes the links of a segment of n chunks, or of as many as the
// links say when n is negative. The chunks of targets are for the caller to
// check, who knows their tables.
func decodeLinks(data []byte, n int) (*linkFile, error) {
	le := binary.LittleEndian
	body := data[:max(0, len(data)-4)]
	switch {
	case len(body) < linksHeader:
		return nil, fmt.Errorf("links of %d bytes: %w", len(data), errdefs.ErrDataLoss)
	case string(body[:8]) != linksMagic, le.Uint32(body[8:]) != linksVersion, le.Uint32(body[12:]) != 0:
		return nil, fmt.Errorf("links have an unknown magic, version or flag: %w", errdefs.ErrDataLoss)
	case le.Uint32(data[len(body):]) != crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)):
		return nil, fmt.Errorf("links have a wrong checksum: %w", errdefs.ErrDataLoss)
	case n >= 0 && int64(le.Uint32(body[16:])) != int64(n):
		return nil, fmt.Errorf("links for %d chunks, want %d: %w", le.Uint32(body[16:]), n, errdefs.ErrDataLoss)
	}
	n = int(le.Uint32(body[16:]))
	f, targets := &linkFile{chunks: n}, le.Uint32(body[20:])
	rest := body[linksHeader:]
	for range targets {
		t, tail, err := decodeTarget(rest, n)
		if err != nil {
			return nil, err
		}
		f.targets, rest = append(f.targets, t), tail
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("links have %d bytes behind their end: %w", len(rest), errdefs.ErrDataLoss)
	}
	return f, nil
}

func decodeTarget(b []byte, n int) (t linkTarget, rest []byte, err error) {
	le := binary.LittleEndian
	if len(b) < linksTarget {
		return t, nil, fmt.Errorf("links end in a target: %w", errdefs.ErrDataLoss)
	}
	t.id = digest.NewDigestFromBytes(digest.SHA256, b[:32])
	count := int64(le.Uint32(b[32:]))
	b = b[linksTarget:]
	if count*linksPair > int64(len(b)) {
		return t, nil, fmt.Errorf("%d links do not fit into %d bytes: %w", count, len(b), errdefs.ErrDataLoss)
	}
	t.pairs = make([]linkPair, count)
	for k := range t.pairs {
		p := linkPair{chunk: le.Uint32(b[k*linksPair:]), target: le.Uint32(b[k*linksPair+4:])}
		if int64(p.chunk) >= int64(n) || k > 0 && p.chunk <= t.pairs[k-1].chunk {
			return t, nil, fmt.Errorf("link of chunk %d of %d is out of order: %w", p.chunk, n, errdefs.ErrDataLoss)
		}
		t.pairs[k] = p
	}
	return t, b[count*linksPair:], nil
}

// readLinks reads the links file of a segment, see decodeLinks. It returns nil
// when there is none.
func (s *Store) readLinks(id index.ID, n int) (*linkFile, error) {
	data, err := os.ReadFile(s.dir.segment(id, linksFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return decodeLinks(data, n)
}

// writeLinks writes the links file when links have changed. Precondition:
// flushMu is held.
func (g *segment) writeLinks() error {
	if g.links.Load() == nil || !g.relinked.Swap(false) {
		return nil
	}
	data, err := encodeLinks(g.linkFile())
	if err == nil {
		err = g.s.dir.write(g.s.dir.segment(g.id, linksFile), data)
	}
	if err != nil {
		g.relinked.Store(true)
	}
	return err
}

// linkFile returns the links as they are.
func (g *segment) linkFile() *linkFile {
	g.mu.Lock()
	defer g.mu.Unlock()
	l := g.links.Load()
	f := &linkFile{chunks: len(g.table.Chunks)}
	if l == nil {
		return f
	}
	targets := *l.targets.Load()
	f.targets = make([]linkTarget, len(targets))
	for n, t := range targets {
		f.targets[n].id = t.id
	}
	for i := range l.at {
		if v := l.at[i].Load(); v != 0 {
			pairs := &f.targets[v>>32-1].pairs
			*pairs = append(*pairs, linkPair{chunk: uint32(i), target: uint32(v)})
		}
	}
	return f
}
