// Package vhosttest plays the VMM and the guest's driver against a vhost-user
// device, for tests that need rings and messages which no real driver would make.
package vhosttest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// Where the guest's memory lies for the guest and for the VMM.
const (
	GuestBase = 0x4000_0000
	UserBase  = 0x7f00_0000_0000
)

// Requests that a front-end can send; the names are those of vhost-user.rst.
const (
	GetFeatures      = 1
	SetFeatures      = 2
	SetOwner         = 3
	SetMemTable      = 5
	SetVringNum      = 8
	SetVringAddr     = 9
	SetVringBase     = 10
	GetVringBase     = 11
	SetVringKick     = 12
	SetVringCall     = 13
	SetVringErr      = 14
	GetProtoFeatures = 15
	SetProtoFeatures = 16
	GetQueueNum      = 17
	SetVringEnable   = 18
	GetConfig        = 24
	ResetDevice      = 34
	AddMemReg        = 37
	RemMemReg        = 38
	SetStatus        = 39
	GetStatus        = 40
)

// Frontend is one connection to a device, with one region of guest memory.
type Frontend struct {
	t     testing.TB
	Conn  *net.UnixConn
	Mem   []byte // the guest's memory
	memFD int
	// Features are those that were negotiated.
	Features uint64
}

// Dial connects to the device at path with size bytes of guest memory.
func Dial(t testing.TB, path string, size int) *Frontend {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	return New(t, c, size)
}

// New uses an open connection.
func New(t testing.TB, c *net.UnixConn, size int) *Frontend {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close() // tests may have done so
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	})
	return &Frontend{t: t, Conn: c, Mem: mem, memFD: fd}
}

// Send sends one request with flags besides the version.
func (f *Frontend) Send(req, flags uint32, payload []byte, fds ...int) error {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, req)
	b = le.AppendUint32(b, 1|flags)
	b = le.AppendUint32(b, uint32(len(payload)))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err := f.Conn.WriteMsgUnix(append(b, payload...), oob, nil)
	return err
}

// Reply reads one reply's payload.
func (f *Frontend) Reply() ([]byte, error) {
	var h [12]byte
	if _, err := io.ReadFull(f.Conn, h[:]); err != nil {
		return nil, err
	}
	if flags := binary.LittleEndian.Uint32(h[4:]); flags != 5 {
		return nil, fmt.Errorf("reply with flags %#x", flags)
	}
	p := make([]byte, binary.LittleEndian.Uint32(h[8:]))
	_, err := io.ReadFull(f.Conn, p)
	return p, err
}

// Do sends a request that has no reply and waits for its acknowledgement, which
// must be good.
func (f *Frontend) Do(req uint32, payload []byte, fds ...int) {
	f.t.Helper()
	if code := f.Ack(req, payload, fds...); code != 0 {
		f.t.Fatalf("request %d was refused", req)
	}
}

// Ack is Do that returns the acknowledgement: 0 is good.
func (f *Frontend) Ack(req uint32, payload []byte, fds ...int) uint64 {
	f.t.Helper()
	const needReply = 1 << 3
	if err := f.Send(req, needReply, payload, fds...); err != nil {
		f.t.Fatalf("request %d: %v", req, err)
	}
	p, err := f.Reply()
	if err != nil || len(p) != 8 {
		f.t.Fatalf("request %d: reply %x, %v", req, p, err)
	}
	return binary.LittleEndian.Uint64(p)
}

// Ask sends a request and returns its reply.
func (f *Frontend) Ask(req uint32, payload []byte) []byte {
	f.t.Helper()
	if err := f.Send(req, 0, payload); err != nil {
		f.t.Fatalf("request %d: %v", req, err)
	}
	p, err := f.Reply()
	if err != nil {
		f.t.Fatalf("request %d: %v", req, err)
	}
	return p
}

// U64 encodes the values that follow each other.
func U64(vs ...uint64) []byte {
	var b []byte
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// U32 encodes the values that follow each other.
func U32(vs ...uint32) []byte {
	var b []byte
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// Negotiate takes all features that the device offers, except the masked ones.
func (f *Frontend) Negotiate(without uint64) {
	f.t.Helper()
	const protocolFeatures = 1 << 30
	f.Features = binary.LittleEndian.Uint64(f.Ask(GetFeatures, nil)) &^ without
	if f.Features&protocolFeatures != 0 {
		proto := binary.LittleEndian.Uint64(f.Ask(GetProtoFeatures, nil))
		if err := f.Send(SetProtoFeatures, 0, U64(proto)); err != nil {
			f.t.Fatal(err)
		}
	}
	f.Do(SetOwner, nil)
	f.Do(SetFeatures, U64(f.Features))
}

// Region is the payload of ADD_MEM_REG and REM_MEM_REG for all of the memory.
func (f *Frontend) Region() []byte {
	return U64(0, GuestBase, uint64(len(f.Mem)), UserBase, 0)
}

// AddMemory gives the guest's memory to the device.
func (f *Frontend) AddMemory() {
	f.t.Helper()
	f.Do(AddMemReg, f.Region(), f.memFD)
}

// SetMemory does the same with SET_MEM_TABLE, in parts regions of equal size.
func (f *Frontend) SetMemory(parts int) {
	f.t.Helper()
	p := U32(uint32(parts), 0)
	size := uint64(len(f.Mem) / parts)
	var fds []int
	for i := range uint64(parts) {
		p = append(p, U64(GuestBase+i*size, size, UserBase+i*size, i*size)...)
		fds = append(fds, f.memFD)
	}
	f.Do(SetMemTable, p, fds...)
}
