package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// inflight is the record of the chains that one queue has taken and not answered, in
// memory that outlives this process: the next one takes them up again, so that none
// is lost and none is answered twice. Layout and order of the steps are those of
// vhost-user.rst, "Inflight I/O tracking", for split virtqueues; a batch is one
// chain. A process may end between any two of the steps, so each is one atomic
// store.
//
// What is in it was written by a process that a guest may have taken over: any
// content is bounded by the size of the ring and does no more than that guest could
// do by itself.
type inflight struct {
	b       []byte // one queue's region
	counter uint64 // of the chain taken last
}

// Offsets of a region {features u64, version u16, desc_num u16, last_batch_head u16,
// used_idx u16} and of the entries behind it {inflight u8, padding, next u16,
// counter u64}, in bytes.
const (
	inflightVersion = 8 // and desc_num
	inflightLast    = 12
	inflightHeader  = 16
	inflightEntry   = 16
	inflightCounter = 8
	inflightAlign   = 64
)

// inflightBytes is the length of the region of a queue of num descriptors.
func inflightBytes(num int) int {
	return (inflightHeader + inflightEntry*num + inflightAlign - 1) &^ (inflightAlign - 1)
}

func (t *inflight) word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&t.b[off])) }

func (t *inflight) entry(head uint16) *uint32 {
	return t.word(inflightHeader + inflightEntry*int(head))
}

func (t *inflight) taken(head uint16) bool { return atomic.LoadUint32(t.entry(head))&0xff != 0 }

// take records a chain that was popped.
func (t *inflight) take(head uint16) {
	t.counter++
	off := inflightHeader + inflightEntry*int(head) + inflightCounter
	atomic.StoreUint64((*uint64)(unsafe.Pointer(&t.b[off])), t.counter)
	atomic.StoreUint32(t.entry(head), 1)
}

// answering comes before the used index that makes the answer visible.
func (t *inflight) answering(head, usedIdx uint16) { t.setLast(head, usedIdx) }

// answered comes behind it.
func (t *inflight) answered(head, usedIdx uint16) {
	atomic.StoreUint32(t.entry(head), 0)
	t.setLast(head, usedIdx)
}

// setLast writes last_batch_head and used_idx.
func (t *inflight) setLast(head, usedIdx uint16) {
	atomic.StoreUint32(t.word(inflightLast), uint32(head)|uint32(usedIdx)<<16)
}

// resume returns the heads without an answer of a ring of num descriptors whose used
// index is usedIdx, in the order in which they were taken, or begins a new record;
// then it is false.
func (t *inflight) resume(num, usedIdx uint16) (heads []uint16, ok bool) {
	if version := atomic.LoadUint32(t.word(inflightVersion)); version != 1|uint32(num)<<16 {
		clear(t.b)
		t.setLast(0, usedIdx)
		atomic.StoreUint32(t.word(inflightVersion), 1|uint32(num)<<16)
		return nil, false
	}
	// The end came between the used index and the note of it.
	last := atomic.LoadUint32(t.word(inflightLast))
	if head := uint16(last); uint16(last>>16) != usedIdx && head < num {
		t.answered(head, usedIdx)
	}
	for head := range num {
		if t.taken(head) {
			heads = append(heads, head)
		}
	}
	order := func(head uint16) uint64 {
		return binary.LittleEndian.Uint64(t.b[inflightHeader+inflightEntry*int(head)+inflightCounter:])
	}
	slices.SortFunc(heads, func(a, b uint16) int {
		if order(a) < order(b) {
			return -1
		}
		return 1
	})
	if len(heads) > 0 {
		t.counter = order(heads[len(heads)-1])
	}
	return heads, true
}

// forgetRecord has the next start of queue i begin a new record. fd is that of the
// whole area, with rings of maxQueue.
func forgetRecord(fd, i int) error {
	var none [4]byte
	if _, err := unix.Pwrite(fd, none[:], int64(i*inflightBytes(maxQueue)+inflightVersion)); err != nil {
		return fmt.Errorf("forget chains of queue %d: %w", i, err)
	}
	return nil
}

// inflightArea is the payload of SET_INFLIGHT_FD.
type inflightArea struct {
	size, offset      uint64 // bytes in the file
	queues, queueSize uint16
}

func parseInflight(p []byte) (inflightArea, error) {
	if err := checkLen(p, 20); err != nil {
		return inflightArea{}, err
	}
	le := binary.LittleEndian
	a := inflightArea{le.Uint64(p), le.Uint64(p[8:]), le.Uint16(p[16:]), le.Uint16(p[18:])}
	need := uint64(a.queues) * uint64(inflightBytes(int(a.queueSize)))
	if a.queueSize > maxQueue || a.queues > maxQueues || a.size < need || a.size > math.MaxInt32 || a.offset > math.MaxInt32 {
		return a, fmt.Errorf("%w: record of %d queues of %d in %d bytes", ErrProtocol, a.queues, a.queueSize, a.size)
	}
	return a, nil
}

func (a *inflightArea) encode() []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(le.AppendUint64(nil, a.size), a.offset)
	return le.AppendUint16(le.AppendUint16(b, a.queues), a.queueSize)
}

// setInflight maps the record. Precondition: no ring was started yet.
func (s *session) setInflight(m *message) error {
	a, err := parseInflight(m.payload)
	if err != nil {
		return err
	}
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	data, err := a.mmap(fd)
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("map record of chains: %w", err)
	}
	if s.record != nil || slices.ContainsFunc(s.rings, func(r vring) bool { return r.told }) {
		return errors.Join(fmt.Errorf("%w: record of chains for rings that run", ErrProtocol), unix.Munmap(data))
	}
	s.record, s.recordSize = data, int(a.queueSize)
	each := inflightBytes(s.recordSize)
	for i := range min(int(a.queues), len(s.rings)) {
		s.rings[i].record = &inflight{b: data[i*each : (i+1)*each]}
	}
	return nil
}

func (a *inflightArea) mmap(fd int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Size < int64(a.offset+a.size) || a.size == 0 {
		return nil, fmt.Errorf("%w: %d bytes at %d in a file of %d", ErrProtocol, a.size, a.offset, st.Size)
	}
	return unix.Mmap(fd, int64(a.offset), int(a.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}
