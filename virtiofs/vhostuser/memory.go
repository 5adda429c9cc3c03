package vhostuser

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxMemSlots is the number of memory regions that a guest may have.
const maxMemSlots = 32

// region is a piece of guest memory; addresses and sizes in bytes.
type region struct {
	guest  uint64 // guest physical address
	size   uint64
	user   uint64 // where the front-end has it in its own address space
	offset uint64 // in the file that was passed
	data   []byte // the mapping, size bytes
}

func (r *region) check() error {
	const limit = math.MaxInt64
	if r.size == 0 || r.size > limit || r.guest > math.MaxUint64-r.size ||
		r.user > math.MaxUint64-r.size || r.offset > limit-r.size {
		return fmt.Errorf("%w: memory region %#x+%#x at file offset %#x", ErrProtocol, r.guest, r.size, r.offset)
	}
	return nil
}

func (r *region) same(o *region) bool {
	return r.guest == o.guest && r.size == o.size && r.user == o.user
}

func (r *region) overlaps(o *region) bool {
	return r.guest < o.guest+o.size && o.guest < r.guest+r.size
}

// memory is the guest's memory as the front-end shared it. Look-ups take no lock;
// one goroutine changes the table, and unmaps only while no queue runs.
type memory struct {
	table atomic.Pointer[[]region]
}

func (m *memory) regions() []region {
	if t := m.table.Load(); t != nil {
		return *t
	}
	return nil
}

// add maps r from fd and closes fd.
func (m *memory) add(r region, fd int) (err error) {
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	old := m.regions()
	if len(old) >= maxMemSlots {
		return fmt.Errorf("add memory region: %d regions already", len(old))
	}
	for i := range old {
		if r.overlaps(&old[i]) {
			return fmt.Errorf("%w: memory region %#x+%#x overlaps another", ErrProtocol, r.guest, r.size)
		}
	}
	if err := r.mmap(fd); err != nil {
		return err
	}
	next := append(old[:len(old):len(old)], r)
	m.table.Store(&next)
	return nil
}

func (r *region) mmap(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat guest memory: %w", err)
	}
	// Touching a mapping behind the end of its file is SIGBUS.
	if st.Mode&unix.S_IFMT == unix.S_IFREG && uint64(st.Size) < r.offset+r.size {
		return fmt.Errorf("%w: memory region of %#x bytes at %#x in a file of %#x", ErrProtocol, r.size, r.offset, st.Size)
	}
	data, err := unix.Mmap(fd, int64(r.offset), int(r.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("map guest memory: %w", err)
	}
	_ = unix.Madvise(data, unix.MADV_DONTDUMP) // keeps guests out of core dumps where the kernel can
	r.data = data
	return nil
}

// remove unmaps a region. Precondition: no queue runs.
func (m *memory) remove(r region) error {
	old := m.regions()
	for i := range old {
		if !old[i].same(&r) {
			continue
		}
		next := append(old[:i:i], old[i+1:]...)
		m.table.Store(&next)
		return unix.Munmap(old[i].data)
	}
	return fmt.Errorf("%w: no memory region %#x+%#x to remove", ErrProtocol, r.guest, r.size)
}

// clear unmaps everything. Precondition: no queue runs.
func (m *memory) clear() error {
	old := m.regions()
	m.table.Store(nil)
	var errs []error
	for i := range old {
		errs = append(errs, unix.Munmap(old[i].data))
	}
	return errors.Join(errs...)
}

// userBytes resolves n bytes at an address of the front-end; nil when they are
// not inside one region.
func (m *memory) userBytes(addr, n uint64) []byte {
	rs := m.regions()
	for i := range rs {
		r := &rs[i]
		if o := addr - r.user; addr >= r.user && o < r.size && n <= r.size-o {
			return r.data[o : o+n : o+n]
		}
	}
	return nil
}

// guestBytes appends to dst the slices that are guest physical [addr, addr+n).
// Two regions may meet inside the range.
func (m *memory) guestBytes(dst [][]byte, addr, n uint64) ([][]byte, bool) {
	for n > 0 {
		b := m.guestRun(addr, n)
		if b == nil {
			return dst, false
		}
		dst = append(dst, b)
		addr += uint64(len(b)) // cannot wrap: region.check
		n -= uint64(len(b))
	}
	return dst, true
}

// guestRun is the longest run of at most n bytes at addr inside one region.
func (m *memory) guestRun(addr, n uint64) []byte {
	rs := m.regions()
	for i := range rs {
		r := &rs[i]
		if o := addr - r.guest; addr >= r.guest && o < r.size {
			k := min(n, r.size-o)
			return r.data[o : o+k : o+k]
		}
	}
	return nil
}
