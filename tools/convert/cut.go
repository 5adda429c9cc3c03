package convert

import "bytes"

// cutter divides files into chunks.
type cutter struct {
	size    int64 // of the largest chunk, bytes
	content bool  // by content
}

// zeroRun is how many zeros are worth a chunk of their own, which is not
// fetched.
const zeroRun = 64 << 10

var zeros [zeroRun]byte

// cut finds where the first chunk of window ends, which is size bytes of a file
// or all that is left of it, and whether the chunk is nothing but zeros.
func (c cutter) cut(window []byte) (n int, empty bool) {
	if !c.content {
		return len(window), false
	}
	at := zerosAt(window, int(min(c.size, zeroRun)))
	if at == 0 {
		n := 0
		for n < len(window) && window[n] == 0 {
			n++
		}
		return n, true
	}
	return c.roll(window[:at]), false
}

// zerosAt finds where the first run of zeros begins that fills an aligned block
// of run bytes; len(p) if none does.
func zerosAt(p []byte, run int) int {
	for off := 0; off+run <= len(p); off += run {
		if !bytes.Equal(p[off:off+run], zeros[:run]) {
			continue
		}
		for off > 0 && p[off-1] == 0 {
			off--
		}
		return off
	}
	return len(p)
}

// roll is where the gear hash of the last 64 bytes says that a chunk ends
// (FastCDC, USENIX ATC 2016): behind an eighth of the largest chunk, and about a
// quarter of it later on average.
func (c cutter) roll(p []byte) int {
	low := int(c.size / 8)
	if len(p) <= low {
		return len(p)
	}
	mask := maskOf(c.size / 4)
	hash := uint64(0)
	for _, b := range p[max(low-64, 0):low] {
		hash = hash<<1 + gear[b]
	}
	for i, b := range p[low:] {
		hash = hash<<1 + gear[b]
		if hash&mask == 0 {
			return low + i + 1
		}
	}
	return len(p)
}

// maskOf has as many of the highest bits, which depend on most bytes, as make
// every n-th hash match.
func maskOf(n int64) uint64 {
	mask := uint64(0)
	for ; n > 1; n >>= 1 {
		mask = mask>>1 | 1<<63
	}
	return mask
}

// gear has a random number for each byte. Chunks depend on it: it never changes.
var gear = newGear()

// newGear fills the table with SplitMix64.
func newGear() (table [256]uint64) {
	state := uint64(0)
	for i := range table {
		state += 0x9e3779b97f4a7c15
		z := state
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		table[i] = z ^ z>>31
	}
	return table
}
