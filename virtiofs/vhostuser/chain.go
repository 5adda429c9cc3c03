package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
)

// maxChain bounds the descriptors of one chain, those of its indirect table
// included; QEMU has the same bound (VIRTQUEUE_MAX_SIZE).
const maxChain = 1024

// errRing marks a ring that the driver filled against the rules.
var errRing = errors.New("bad virtqueue")

const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
)

// Chain is one buffer of the driver. Its slices are guest memory, which the guest
// can change at any moment: copy what shall be parsed. They stay valid until the
// chain is pushed.
type Chain struct {
	head uint16
	// Readable holds what the driver wrote for the device.
	Readable [][]byte
	// Writable is the room for the device's answer.
	Writable [][]byte
	indirect []byte // scratch: a copy of the indirect table
}

// Len is the number of bytes in bufs.
func Len(bufs [][]byte) int64 {
	var n int64
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// CopyOut copies the beginning of bufs to p and returns what is left of bufs. It
// moves the slices of bufs.
func CopyOut(p []byte, bufs [][]byte) (n int, rest [][]byte) {
	for len(bufs) > 0 && n < len(p) {
		k := copy(p[n:], bufs[0])
		n += k
		if bufs[0] = bufs[0][k:]; len(bufs[0]) == 0 {
			bufs = bufs[1:]
		}
	}
	return n, bufs
}

// CopyIn copies p to the beginning of bufs and returns what is left of bufs. It
// moves the slices of bufs.
func CopyIn(bufs [][]byte, p []byte) (n int, rest [][]byte) {
	for len(bufs) > 0 && n < len(p) {
		k := copy(bufs[0], p[n:])
		n += k
		if bufs[0] = bufs[0][k:]; len(bufs[0]) == 0 {
			bufs = bufs[1:]
		}
	}
	return n, bufs
}

// descriptor is a copy of one table entry.
type descriptor struct {
	addr  uint64 // guest physical
	len   uint32
	flags uint16
	next  uint16
}

func parseDescriptor(b []byte) descriptor {
	// One copy first: the guest may change the entry between two loads.
	var d [descLen]byte
	copy(d[:], b)
	le := binary.LittleEndian
	return descriptor{le.Uint64(d[0:]), le.Uint32(d[8:]), le.Uint16(d[12:]), le.Uint16(d[14:])}
}

// walker follows the descriptors of one chain.
type walker struct {
	mem   *memory
	table []byte // whole descriptors
	steps int
	bytes uint64
}

// walk fills c with the chain that begins at head of table.
func (c *Chain) walk(m *memory, table []byte, head uint16) error {
	c.head, c.Readable, c.Writable = head, c.Readable[:0], c.Writable[:0]
	w := walker{mem: m, table: table}
	d, err := w.at(int(head))
	if err != nil {
		return err
	}
	// An indirect table is the last (VIRTIO_F_INDIRECT_DESC: never with NEXT) and
	// holds no other: after this, the flag is an error.
	for d.flags&descIndirect == 0 && d.flags&descNext != 0 {
		if d, err = w.add(c, d); err != nil {
			return err
		}
	}
	if d.flags&descIndirect == 0 {
		return w.put(c, d)
	}
	return w.indirect(c, d)
}

func (w *walker) indirect(c *Chain, d descriptor) error {
	if d.flags&descNext != 0 || d.len == 0 || d.len%descLen != 0 || d.len > maxChain*descLen {
		return fmt.Errorf("%w: indirect table of %d bytes, flags %#x", errRing, d.len, d.flags)
	}
	t, ok := w.mem.guestBytes(nil, d.addr, uint64(d.len))
	if !ok {
		return fmt.Errorf("%w: indirect table %#x+%#x outside of memory", errRing, d.addr, d.len)
	}
	// Copied at once: it may cross two regions, and it must not change under us.
	c.indirect = slices.Grow(c.indirect[:0], int(d.len))[:d.len]
	CopyOut(c.indirect, t)
	w.table = c.indirect
	d, err := w.at(0)
	for err == nil && d.flags&descNext != 0 {
		d, err = w.add(c, d)
	}
	if err != nil {
		return err
	}
	return w.put(c, d)
}

func (w *walker) at(i int) (descriptor, error) {
	if i >= len(w.table)/descLen {
		return descriptor{}, fmt.Errorf("%w: descriptor %d of %d", errRing, i, len(w.table)/descLen)
	}
	return parseDescriptor(w.table[i*descLen:]), nil
}

// add puts d into c and returns the one behind it.
func (w *walker) add(c *Chain, d descriptor) (descriptor, error) {
	if err := w.put(c, d); err != nil {
		return descriptor{}, err
	}
	return w.at(int(d.next))
}

func (w *walker) put(c *Chain, d descriptor) error {
	w.steps++
	w.bytes += uint64(d.len)
	switch {
	case w.steps > maxChain:
		return fmt.Errorf("%w: chain of more than %d descriptors", errRing, maxChain)
	case w.bytes > math.MaxUint32: // section 2.7.13: a driver must not
		return fmt.Errorf("%w: chain of more than 4 GiB", errRing)
	case d.flags&^(descNext|descWrite) != 0:
		return fmt.Errorf("%w: descriptor flags %#x", errRing, d.flags)
	case d.flags&descWrite == 0 && len(c.Writable) > 0:
		return fmt.Errorf("%w: readable descriptor behind a writable one", errRing)
	}
	var ok bool
	if d.flags&descWrite != 0 {
		c.Writable, ok = w.mem.guestBytes(c.Writable, d.addr, uint64(d.len))
	} else {
		c.Readable, ok = w.mem.guestBytes(c.Readable, d.addr, uint64(d.len))
	}
	if !ok {
		return fmt.Errorf("%w: descriptor %#x+%#x outside of memory", errRing, d.addr, d.len)
	}
	return nil
}
