package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store/replace"
)

// The use file, little-endian: magic, version and flags (4 bytes each, flags 0),
// length of an extent in bytes (8 bytes) and number of extents (4 bytes); of each
// extent how many blocks of it are there, when it was used last (4 bytes each), and
// its level (1 byte); and a CRC-32C over all before it.
const (
	useMagic   = "TATAMI\x00U"
	useVersion = 1
	useHeader  = len(useMagic) + 4 + 4 + 8 + 4
	useExtent  = 4 + 4 + 1
	useTrailer = 4
)

func encodeUse(extents []replace.Extent, size int64) []byte {
	le := binary.LittleEndian
	out := make([]byte, 0, useHeader+useExtent*len(extents)+useTrailer)
	out = append(out, useMagic...)
	out = le.AppendUint32(out, useVersion)
	out = le.AppendUint32(out, 0)
	out = le.AppendUint64(out, uint64(size))
	out = le.AppendUint32(out, uint32(len(extents)))
	for _, e := range extents {
		out = le.AppendUint32(out, uint32(index.RoundUp(e.Bytes)/index.BlockSize))
		out = le.AppendUint32(out, e.Last)
		out = append(out, byte(e.Level))
	}
	return le.AppendUint32(out, crc32.Checksum(out, crc32.MakeTable(crc32.Castagnoli)))
}

// decodeUse decodes the use of a segment of n extents of size bytes each. What is
// not there counts as gone just now.
func decodeUse(data []byte, n int, size int64) ([]replace.Extent, error) {
	le := binary.LittleEndian
	body := data[:max(0, len(data)-useTrailer)]
	switch {
	case len(body) != useHeader+useExtent*n:
		return nil, fmt.Errorf("use of %d bytes for %d extents: %w", len(data), n, errdefs.ErrDataLoss)
	case string(body[:8]) != useMagic, le.Uint32(body[8:]) != useVersion, le.Uint32(body[12:]) != 0:
		return nil, fmt.Errorf("use has an unknown magic, version or flag: %w", errdefs.ErrDataLoss)
	case le.Uint64(body[16:]) != uint64(size), le.Uint32(body[24:]) != uint32(n):
		return nil, fmt.Errorf("use of %d extents of %d bytes: %w", le.Uint32(body[24:]), le.Uint64(body[16:]), errdefs.ErrDataLoss)
	case le.Uint32(data[len(body):]) != crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)):
		return nil, fmt.Errorf("use has a wrong checksum: %w", errdefs.ErrDataLoss)
	}
	out := make([]replace.Extent, n)
	for i := range out {
		b := body[useHeader+useExtent*i:]
		out[i] = replace.Extent{Bytes: int64(le.Uint32(b)) * index.BlockSize, Last: le.Uint32(b[4:]), Level: min(replace.Level(b[8]), replace.Protected)}
		if out[i].Bytes == 0 && out[i].Last > 0 {
			out[i].Gone = 1
		}
	}
	return out, nil
}

// readUse reads how the n extents of a segment were used. Without a file of it, or
// with one that is damaged, nothing is known.
func (s *Store) readUse(id index.ID, n int) []replace.Extent {
	data, err := os.ReadFile(s.dir.segment(id, useFile))
	if err == nil {
		if out, err := decodeUse(data, n, s.usage.extent); err == nil {
			return out
		}
	}
	return make([]replace.Extent, n)
}
