package virtiofs

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// FuzzRequest sends one request of a guest to a device, after which the device has
// to work as before.
func FuzzRequest(f *testing.F) {
	for opcode := range kinds {
		f.Add(message(opcode, 2, make([]byte, 64)), uint16(200))
	}
	f.Add(message(opLookup, 1, []byte("image\x00")), uint16(144))
	f.Add(readMessage(2, 100, 5000), uint16(outHeaderSize+5000))
	f.Add(message(opReaddir, 1, words(0, 0, 4096, 0, 0)), uint16(5000))
	f.Add(message(opInit, 0, binary.LittleEndian.AppendUint64(nil, 7|31<<32)), uint16(100))
	f.Add(extended(message(3, 2, words(0, 0))), uint16(200))
	f.Add([]byte("short"), uint16(3))
	f.Fuzz(func(t *testing.T, msg []byte, room uint16) {
		g := initialized(t, Config{Directory: directory(t, map[string]File{"image": good(10_000)})})
		node, _, errno := g.lookup("image")
		if errno != 0 {
			t.Fatal(errno)
		}
		msg = bytes.Clone(msg[:min(len(msg), 32<<10)])
		g.offer(1, msg, int(room))
		_, n, ok := g.rings[1].WaitUsed(wait)
		if !ok || int(n) > int(room) {
			t.Fatalf("%d bytes in room for %d, %v", n, room, ok)
		}
		if le := binary.LittleEndian; n >= outHeaderSize && (le.Uint32(g.fe.Mem[outAt:]) != n || le.Uint64(g.fe.Mem[outAt+8:]) != g.unique) {
			t.Fatalf("header %x of %d bytes", g.fe.Mem[outAt:outAt+outHeaderSize], n)
		}
		if got, errno := g.read(node, 1, 9000); errno != 0 || !bytes.Equal(got, contents(1, 9000)) {
			t.Fatal("the device does not work any more", errno)
		}
	})
}

// What was checked of a request is what is used, however the guest changes it
// meanwhile: no answer is longer than its room.
func TestChangingRequest(t *testing.T) {
	g := initialized(t, Config{Directory: directory(t, map[string]File{"image": mapped(t, 1<<20, 1<<20, nil)})})
	node, _, _ := g.lookup("image")
	const n = 64
	g.unique++
	msg := readMessage(node, 0, n)
	binary.LittleEndian.PutUint64(msg[8:], g.unique)
	copy(g.fe.Mem[inAt:], msg)
	stop, changed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(changed)
		for size := uint32(n); ; size ^= n ^ maxRead {
			select {
			case <-stop:
				return
			default:
				binary.LittleEndian.PutUint32(g.fe.Mem[inAt+readSize:], size)
				runtime.Gosched() // the device may have this processor, too
			}
		}
	}()
	r, seen := g.rings[1], map[uint32]int{}
	for range 500 {
		r.SetDesc(0, vhosttest.Desc{Addr: vhosttest.GuestBase + inAt, Len: uint32(len(msg)), Flags: vhosttest.Next, Next: 1})
		r.SetDesc(1, vhosttest.Desc{Addr: vhosttest.GuestBase + outAt, Len: outHeaderSize + n, Flags: vhosttest.Write})
		r.Offer(0)
		_, used, ok := r.WaitUsed(wait)
		if !ok {
			t.Fatal("no answer")
		}
		seen[used]++
	}
	close(stop)
	<-changed
	if seen[outHeaderSize+n]+seen[outHeaderSize] != 500 {
		t.Errorf("answers by their length: %v", seen)
	}
}
