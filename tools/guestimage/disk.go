package guestimage

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"github.com/containerd/errdefs"
)

// Sizes of a partitioned disk in bytes.
const (
	sectorSize = 512
	alignment  = 1 << 20 // of partitions and of the disk
)

// writeMeasured writes a disk with a file system as its first partition and
// that one's hash tree as its second, and returns the parameters that the tree
// is checked with. The guest's mount script tells a measured extension by the
// second partition.
func writeMeasured(w io.WriterAt, image, salt []byte) (params string, err error) {
	if salt == nil {
		salt = contentSalt(image)
	}
	hashes, root := hashTree(image, salt)
	first := partition{off: alignment, size: int64(len(image))}
	second := partition{off: align(first.end()), size: int64(len(hashes))}
	size := align(second.end())
	if size/sectorSize > math.MaxUint32 {
		return "", fmt.Errorf("a disk of %d bytes does not fit into its partition table: %w", size, errdefs.ErrInvalidArgument)
	}
	table := partitionTable(root[:4], first, second)
	for _, part := range []struct {
		at   int64
		data []byte
	}{{0, table}, {first.off, image}, {second.off, hashes}, {size - 1, []byte{0}}} {
		if _, err := w.WriteAt(part.data, part.at); err != nil {
			return "", err
		}
	}
	return verityParams(root, salt, len(image)/verityBlock), nil
}

// partition is a range of a disk in bytes, whole sectors.
type partition struct{ off, size int64 }

func (p partition) end() int64 { return p.off + p.size }

func align(n int64) int64 { return (n + alignment - 1) &^ (alignment - 1) }

// partitionTable makes a master boot record (UEFI Specification, 5.2.1). id is
// the disk's signature.
func partitionTable(id []byte, parts ...partition) []byte {
	b := make([]byte, sectorSize)
	copy(b[440:444], id)
	for n, p := range parts {
		e := b[446+16*n:]
		copy(e[1:], []byte{0xfe, 0xff, 0xff}) // no cylinders and heads: the numbers below count
		e[4] = 0x83                           // Linux
		copy(e[5:], []byte{0xfe, 0xff, 0xff})
		binary.LittleEndian.PutUint32(e[8:], uint32(p.off/sectorSize))
		binary.LittleEndian.PutUint32(e[12:], uint32(p.size/sectorSize))
	}
	b[510], b[511] = 0x55, 0xaa
	return b
}
