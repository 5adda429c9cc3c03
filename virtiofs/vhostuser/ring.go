package vhostuser

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// maxQueue is the largest split virtqueue of the specification, in descriptors.
const maxQueue = 32768

// ring gives access to the three parts of a split virtqueue in guest memory. The
// guest runs on other CPUs: indexes and event words are read and written with
// sync/atomic on the aligned 32-bit word around them, which gives acquire on
// loads and release on stores; the rest is ordered by these.
type ring struct {
	num   uint16 // descriptors, a power of two
	desc  []byte // num × {addr u64, len u32, flags u16, next u16}
	avail []byte // {flags u16, idx u16, num × u16, used_event u16}
	used  []byte // {flags u16, idx u16, num × {id u32, len u32}, avail_event u16}
}

const (
	descLen       = 16 // bytes
	usedElemLen   = 8  // bytes
	ringHeaderLen = 4  // bytes, flags and idx

	availNoInterrupt = 1 // flag of the avail part: the driver wants no calls
)

func newRing(m *memory, num uint32, a vringAddr) (ring, error) {
	if num == 0 || num > maxQueue || num&(num-1) != 0 {
		return ring{}, fmt.Errorf("ring of %d descriptors", num)
	}
	n := uint64(num)
	r := ring{
		num:   uint16(num),
		desc:  m.userBytes(a.desc, descLen*n),
		avail: m.userBytes(a.avail, ringHeaderLen+2*n+2),
		used:  m.userBytes(a.used, ringHeaderLen+usedElemLen*n+2),
	}
	if r.desc == nil || r.avail == nil || r.used == nil {
		return ring{}, fmt.Errorf("ring lies outside the guest's memory")
	}
	// Alignment that virtio asks for (section 2.7); the atomic words need it.
	if misaligned(r.desc, 16) || misaligned(r.avail, 2) || misaligned(r.used, 4) {
		return ring{}, fmt.Errorf("ring is not aligned")
	}
	return r, nil
}

func misaligned(b []byte, n uintptr) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))%n != 0
}

// word is the aligned 32-bit word that holds the u16 at off, and the u16's place
// in it. Precondition: off+2 <= len(b), b+off is 2-aligned. The word may begin or
// end outside of b but never outside the mapping, which consists of whole pages.
func word(b []byte, off int) (w *uint32, shift uint) {
	p := unsafe.Pointer(&b[off])
	odd := uintptr(p) & 2
	return (*uint32)(unsafe.Add(p, -int(odd))), uint(odd) * 8
}

func load16(b []byte, off int) uint16 {
	w, shift := word(b, off)
	return uint16(atomic.LoadUint32(w) >> shift)
}

// store16 leaves the other half of the word to the guest.
func store16(b []byte, off int, v uint16) {
	w, shift := word(b, off)
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}

func (r *ring) availFlags() uint16 { return load16(r.avail, 0) }
func (r *ring) availIdx() uint16   { return load16(r.avail, 2) }
func (r *ring) usedIdx() uint16    { return load16(r.used, 2) }
func (r *ring) usedEvent() uint16  { return load16(r.avail, ringHeaderLen+2*int(r.num)) }

// setAvailEvent asks for a kick when the driver's index passes v. It orders like a
// full barrier: a load of availIdx behind it is not moved before it.
func (r *ring) setAvailEvent(v uint16) {
	store16(r.used, ringHeaderLen+usedElemLen*int(r.num), v)
}

// availHead is the head of the chain that the driver offered under index i.
func (r *ring) availHead(i uint16) uint16 {
	off := ringHeaderLen + 2*int(i%r.num)
	return binary.LittleEndian.Uint16(r.avail[off:])
}

// setUsed fills used element i; setUsedIdx makes it visible.
func (r *ring) setUsed(i, head uint16, n uint32) {
	b := r.used[ringHeaderLen+usedElemLen*int(i%r.num):]
	binary.LittleEndian.PutUint32(b, uint32(head))
	binary.LittleEndian.PutUint32(b[4:], n)
}

// setUsedIdx orders like setAvailEvent: the elements are written before it, and a
// load of usedEvent or availFlags behind it is not moved before it. (On arm64 that
// is the rule for a load-acquire behind a store-release.)
func (r *ring) setUsedIdx(i uint16) { store16(r.used, 2, i) }
