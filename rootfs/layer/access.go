package layer

import (
	"math"
	"slices"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// maxWaste is how many plain bytes a read may decompress for nothing before
// streaming the blob once is the better way. It is eight times the usual
// distance of checkpoints in blobs of any size.
const maxWaste = 32 << 20

// RandomAccess says whether every part of a layer's segment can be had without
// decompressing more than 32 MiB of other plain bytes before it. It cannot
// where a blob is one long zstd frame, in which no reader can start but at its
// beginning.
func RandomAccess(l *index.Layer) bool {
	if f := l.Access.Format; f != index.Gzip && f != index.Zstd {
		return true
	}
	next := dataEnd(l.Access.Extents)
	for _, c := range slices.Backward(l.Access.Checkpoints) {
		if next-c.Out > maxWaste {
			return false
		}
		next = min(next, c.Out)
	}
	return next <= dataStart(l.Access.Extents)
}

// dataStart is the tar offset of the first byte that a segment has of it.
func dataStart(extents []index.Extent) int64 {
	start := int64(math.MaxInt64)
	for _, x := range extents {
		start = min(start, x.Tar)
	}
	return start
}

// dataEnd is the tar offset behind the last byte that a segment has of it.
func dataEnd(extents []index.Extent) int64 {
	end := int64(0)
	for _, x := range extents {
		end = max(end, x.Tar+x.Len)
	}
	return end
}
