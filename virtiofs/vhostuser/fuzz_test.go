package vhostuser

import (
	"bytes"
	"encoding/binary"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nopDevice ignores its queues.
type nopDevice struct{}

func (nopDevice) Serve(_ int, q *Queue) {
	var c Chain
	for {
		if ok, err := q.Pop(&c); err != nil {
			return
		} else if ok {
			q.Push(&c, 0)
			continue
		}
		if !q.Wait() {
			return
		}
	}
}
func (nopDevice) Stopped(int) {}

func message1(req request, payload []byte) []byte {
	b := appendReply(req, payload)
	b[4] = flagVersion // a request
	return b
}

// FuzzMessages runs a stream of messages against a session; every message that
// wants a descriptor finds a good one.
func FuzzMessages(f *testing.F) {
	le := binary.LittleEndian
	region := make([]byte, 40)
	le.PutUint64(region[8:], 0x1000)
	le.PutUint64(region[16:], 0x4000)
	le.PutUint64(region[24:], 0x7000_0000)
	addr := make([]byte, 40)
	le.PutUint64(addr[8:], 0x7000_0000)
	le.PutUint64(addr[16:], 0x7000_2000)
	le.PutUint64(addr[24:], 0x7000_1000)
	zero := make([]byte, 8)
	f.Add(bytes.Join([][]byte{
		message1(setFeatures, encodeU64(ownFeatures)), message1(addMemReg, region),
		message1(setVringNum, encodeU64(16<<32)), message1(setVringBase, zero), message1(setVringAddr, addr),
		message1(setVringCall, zero), message1(setVringKick, zero), message1(setVringEnable, encodeU64(1<<32)),
		message1(remMemReg, region), message1(getVringBase, zero),
	}, nil))
	f.Add(message1(setMemTable, append(encodeU64(1), region[8:]...)))
	f.Add(message1(getConfig, make([]byte, 20)))
	f.Add(message1(setStatus, zero))
	f.Fuzz(func(t *testing.T, data []byte) {
		srv, err := New(Config{Device: nopDevice{}, Queues: 2, Space: make([]byte, 8)})
		if err != nil {
			t.Fatal(err)
		}
		s := newSession(srv.cfg, nil)
		defer func() {
			s.reset()
			for i := range s.rings {
				closeFile(s.rings[i].kick)
				closeFile(s.rings[i].call)
				closeFile(s.rings[i].errFD)
			}
			if err := s.mem.clear(); err != nil {
				t.Error(err)
			}
		}()
		for len(data) >= headerLen {
			h, err := parseHeader([headerLen]byte(data))
			data = data[headerLen:]
			if err != nil || int(h.size) > len(data) {
				return
			}
			m := &message{header: h, payload: data[:h.size], fds: fuzzFDs(t, h.req)}
			data = data[h.size:]
			reply, _ := s.handle(m)
			m.closeFDs()
			if len(reply) > configHeaderLen+maxConfig {
				t.Fatalf("message %d: reply of %d bytes", h.req, len(reply))
			}
		}
	})
}

func fuzzFDs(t *testing.T, req request) []int {
	var fd int
	var err error
	switch req {
	case setMemTable, addMemReg:
		if fd, err = unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC); err == nil {
			err = unix.Ftruncate(fd, 0x10000)
		}
	case setVringKick, setVringCall, setVringErr:
		fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	default:
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return []int{fd}
}

// FuzzChain walks a ring in a memory of two regions; the input is the beginning
// of the first one: the descriptors.
func FuzzChain(f *testing.F) {
	desc := func(addr uint64, n uint32, flags, next uint16) []byte {
		le := binary.LittleEndian
		return le.AppendUint16(le.AppendUint16(le.AppendUint32(le.AppendUint64(nil, addr), n), flags), next)
	}
	f.Add(uint16(0), desc(0x1000, 16, 0, 0))
	f.Add(uint16(0), append(desc(0x4ff8, 16, descNext, 1), desc(0x1000, 5, descWrite, 0)...))
	f.Add(uint16(1), append(desc(0x1000, 16, descNext, 1), desc(0x1000, 5, descNext, 0)...))
	f.Add(uint16(0), append(desc(0x1010, 32, descIndirect, 0), desc(0x1000, 0xffffffff, descNext, 1)...))
	f.Fuzz(func(t *testing.T, head uint16, data []byte) {
		a, b := make([]byte, 0x4000), make([]byte, 0x1000)
		copy(a, data)
		var m memory
		m.table.Store(&[]region{{guest: 0x1000, size: 0x4000, data: a}, {guest: 0x5000, size: 0x1000, data: b}})
		var c Chain
		if c.walk(&m, a[:16*descLen], head) != nil {
			return
		}
		if n := len(c.Readable) + len(c.Writable); n > 2*maxChain {
			t.Fatalf("%d slices", n)
		}
		for _, s := range append(c.Readable, c.Writable...) {
			if !inside(s, a) && !inside(s, b) {
				t.Fatalf("slice of %d bytes outside of guest memory", len(s))
			}
		}
	})
}

func inside(s, mem []byte) bool {
	if len(s) == 0 {
		return true
	}
	lo := uintptr(unsafe.Pointer(&mem[0]))
	p := uintptr(unsafe.Pointer(&s[0]))
	return p >= lo && p+uintptr(len(s)) <= lo+uintptr(len(mem))
}
