package toc

import "github.com/tatami-containers/tatami/rootfs/index"

// MaxSize bounds a TOC's JSON, and it compressed, in bytes.
const MaxSize = 256 << 20

// JSON compresses well, but not without bound.
const (
	maxRatio = 256
	slack    = 1 << 20 // bytes
)

// Limit is how many bytes of JSON may come out of a compressed TOC of the given
// size in bytes. Whoever unpacks one must refuse more.
func Limit(packed int64) int64 {
	return min(MaxSize, maxRatio*min(packed, MaxSize)+slack)
}

// Limits of a layer, far above what images have, so that no TOC can exhaust
// memory, the time of a read, or the address space of an image.
const (
	maxEntries = index.MaxEntries // chunks counted
	maxText    = 512 << 20        // names, link targets and attributes, bytes
	maxInner   = 256 << 20        // bytes to unpack for nothing before a chunk
	maxZeros   = 1 << 30          // bytes of zeros to hash, to see that chunks are nothing else
)
