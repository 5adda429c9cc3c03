package vhosttest

import (
	"encoding/binary"
	"errors"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of a descriptor.
const (
	Next     = 1
	Write    = 2
	Indirect = 4
)

// Desc is a descriptor as the driver writes it.
type Desc struct {
	Addr  uint64 // guest physical
	Len   uint32
	Flags uint16
	Next  uint16
}

// Ring is the driver's side of one queue. One goroutine uses it.
type Ring struct {
	f        *Frontend
	Index    int
	Num      int
	off      int // of the ring in guest memory; descriptors, avail, used
	Kicks    int // eventfd
	Calls    int // eventfd
	avail    uint16
	lastUsed uint16
}

// RingBytes is the room that a ring takes in guest memory, in bytes.
func RingBytes(num int) int { return (16*num + 6 + 2*num + 6 + 8*num + 4095) &^ 4095 }

// NewRing places a ring of num descriptors at off in guest memory and tells the
// device, without starting it.
func (f *Frontend) NewRing(index, num, off int) *Ring {
	f.t.Helper()
	r := &Ring{f: f, Index: index, Num: num, off: off, Kicks: eventfd(f), Calls: eventfd(f)}
	clear(f.Mem[off : off+RingBytes(num)])
	r.setup(0)
	return r
}

func eventfd(f *Frontend) int {
	f.t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := unix.Close(fd); err != nil {
			f.t.Error(err)
		}
	})
	return fd
}

func (r *Ring) setup(base uint32) {
	r.f.t.Helper()
	i := uint32(r.Index)
	r.f.Do(SetVringNum, U32(i, uint32(r.Num)))
	r.f.Do(SetVringBase, U32(i, base))
	r.f.Do(SetVringAddr, append(U32(i, 0), U64(r.user(0), r.user(r.usedOff()), r.user(r.availOff()), 0)...))
	r.f.Do(SetVringCall, U64(uint64(i)), r.Calls)
	r.f.Do(SetVringKick, U64(uint64(i)), r.Kicks)
}

func (r *Ring) user(off int) uint64 { return UserBase + uint64(r.off+off) }
func (r *Ring) availOff() int       { return 16 * r.Num }
func (r *Ring) usedOff() int        { return (18*r.Num + 6 + 3) &^ 3 }

// Start enables the ring.
func (r *Ring) Start() {
	r.f.t.Helper()
	r.f.Do(SetVringEnable, U32(uint32(r.Index), 1))
}

// Stop stops the ring and returns the index at which the device stood.
func (r *Ring) Stop() uint32 {
	r.f.t.Helper()
	return binary.LittleEndian.Uint32(r.f.Ask(GetVringBase, U32(uint32(r.Index), 0))[4:])
}

// Restart sets the stopped ring up again, empty, as a rebooted guest does.
func (r *Ring) Restart() {
	r.f.t.Helper()
	clear(r.f.Mem[r.off : r.off+RingBytes(r.Num)])
	r.avail, r.lastUsed = 0, 0
	r.setup(0)
	r.Start()
}

func (r *Ring) word(off int) *uint32 { return (*uint32)(unsafe.Pointer(&r.f.Mem[off])) }

// SetDesc fills descriptor i.
func (r *Ring) SetDesc(i int, d Desc) { PutDesc(r.f.Mem[r.off+16*i:], d) }

// PutDesc encodes a descriptor, for indirect tables.
func PutDesc(b []byte, d Desc) {
	le := binary.LittleEndian
	le.PutUint64(b, d.Addr)
	le.PutUint32(b[8:], d.Len)
	le.PutUint16(b[12:], d.Flags)
	le.PutUint16(b[14:], d.Next)
}

// Offer makes a chain available and kicks.
func (r *Ring) Offer(head uint16) {
	r.Queue(head)
	r.Kick()
}

// Queue makes a chain available without a kick.
func (r *Ring) Queue(head uint16) {
	a := r.off + r.availOff()
	binary.LittleEndian.PutUint16(r.f.Mem[a+4+2*(int(r.avail)%r.Num):], head)
	r.avail++
	r.SetAvailIdx(r.avail)
}

// SetAvailIdx publishes any index.
func (r *Ring) SetAvailIdx(v uint16) {
	atomic.StoreUint32(r.word(r.off+r.availOff()), uint32(v)<<16)
}

// Kick notifies the device.
func (r *Ring) Kick() {
	one := [8]byte{1}
	if _, err := unix.Write(r.Kicks, one[:]); err != nil {
		r.f.t.Errorf("kick: %v", err)
	}
}

// Used takes the next used element, if there is one.
func (r *Ring) Used() (head uint16, n uint32, ok bool) {
	u := r.off + r.usedOff()
	if uint16(atomic.LoadUint32(r.word(u))>>16) == r.lastUsed {
		return 0, 0, false
	}
	e := r.f.Mem[u+4+8*(int(r.lastUsed)%r.Num):]
	r.lastUsed++
	// Ask for a call at the next one (used_event).
	ev := r.off + r.availOff() + 4 + 2*r.Num
	binary.LittleEndian.PutUint16(r.f.Mem[ev:], r.lastUsed)
	return uint16(binary.LittleEndian.Uint32(e)), binary.LittleEndian.Uint32(e[4:]), true
}

// WaitUsed waits for the next used element; ok is false after timeout
// milliseconds.
func (r *Ring) WaitUsed(timeout int) (head uint16, n uint32, ok bool) {
	for {
		if head, n, ok = r.Used(); ok {
			return head, n, ok
		}
		p := []unix.PollFd{{Fd: int32(r.Calls), Events: unix.POLLIN}}
		c, err := unix.Poll(p, timeout)
		if c == 0 && err == nil {
			return r.Used()
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			r.f.t.Fatalf("poll: %v", err)
		}
		var b [8]byte
		_, _ = unix.Read(r.Calls, b[:]) // EAGAIN after EINTR
	}
}
