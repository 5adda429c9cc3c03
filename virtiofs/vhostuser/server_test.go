package vhostuser_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
	"golang.org/x/sys/unix"
)

const (
	num     = 16
	memSize = 1 << 20
	bufs    = 64 << 10 // where buffers begin in guest memory
	wait    = 10_000   // ms, for what must come
)

// echoDevice copies what is readable to what is writable.
type echoDevice struct {
	mu      sync.Mutex
	served  int
	stopped []int
}

func (d *echoDevice) Serve(_ int, q *vhostuser.Queue) {
	d.mu.Lock()
	d.served++
	d.mu.Unlock()
	var c vhostuser.Chain
	for {
		ok, err := q.Pop(&c)
		if err != nil {
			return
		}
		if !ok {
			q.Notify()
			if !q.Wait() {
				return
			}
			continue
		}
		b := make([]byte, vhostuser.Len(c.Readable))
		vhostuser.CopyOut(b, c.Readable)
		n, _ := vhostuser.CopyIn(c.Writable, b)
		q.Push(&c, n)
	}
}

func (d *echoDevice) Stopped(i int) {
	d.mu.Lock()
	d.stopped = append(d.stopped, i)
	d.mu.Unlock()
}

func (d *echoDevice) counts() (served, stopped int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.served, len(d.stopped)
}

type fixture struct {
	dev    *echoDevice
	path   string
	broken chan error
}

// serve runs a server for the test's length.
func serve(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{dev: &echoDevice{}, path: filepath.Join(t.TempDir(), "dev.sock"), broken: make(chan error, 16)}
	srv, err := vhostuser.New(vhostuser.Config{Device: f.dev, Queues: 2, Space: []byte("configuration"),
		Broken: func(err error) { f.broken <- err }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: f.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if served, _ := f.dev.counts(); served > 0 && len(f.dev.stopped) == 0 {
			t.Error("the device was not stopped at the end")
		}
	})
	return f
}

func start(t *testing.T, f *fixture, without uint64) (*vhosttest.Frontend, *vhosttest.Ring) {
	t.Helper()
	fe := vhosttest.Dial(t, f.path, memSize)
	fe.Negotiate(without)
	fe.AddMemory()
	r := fe.NewRing(0, num, 0)
	r.Start()
	return fe, r
}

// echo sends s through the ring in two readable descriptors.
func echo(t *testing.T, fe *vhosttest.Frontend, r *vhosttest.Ring, s string) {
	t.Helper()
	in, out := bufs, bufs+4096
	copy(fe.Mem[in:], s)
	clear(fe.Mem[out : out+len(s)])
	half := len(s) / 2
	r.SetDesc(3, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(in), Len: uint32(half), Flags: vhosttest.Next, Next: 5})
	r.SetDesc(5, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(in+half), Len: uint32(len(s) - half), Flags: vhosttest.Next, Next: 1})
	r.SetDesc(1, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(out), Len: 4096, Flags: vhosttest.Write})
	r.Offer(3)
	expect(t, fe, r, 3, out, s)
}

func expect(t *testing.T, fe *vhosttest.Frontend, r *vhosttest.Ring, head uint16, out int, s string) {
	t.Helper()
	h, n, ok := r.WaitUsed(wait)
	if !ok || h != head || int(n) != len(s) || string(fe.Mem[out:out+len(s)]) != s {
		t.Fatalf("used %d with %d bytes, %v: %q; want %q in chain %d", h, n, ok, fe.Mem[out:out+len(s)], s, head)
	}
}

func TestEcho(t *testing.T) {
	const eventIdx = 1 << 29
	for name, without := range map[string]uint64{"event index": 0, "flags": eventIdx} {
		t.Run(name, func(t *testing.T) {
			fe, r := start(t, serve(t), without)
			for range 3 * num {
				echo(t, fe, r, "through the ring")
			}
		})
	}
}

func TestIndirect(t *testing.T) {
	fe, r := start(t, serve(t), 0)
	table, in, out := bufs, bufs+1024, bufs+4096
	copy(fe.Mem[in:], "indirect")
	vhosttest.PutDesc(fe.Mem[table:], vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(in), Len: 8, Flags: vhosttest.Next, Next: 1})
	vhosttest.PutDesc(fe.Mem[table+16:], vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(out), Len: 64, Flags: vhosttest.Write})
	r.SetDesc(0, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(table), Len: 32, Flags: vhosttest.Indirect})
	r.Offer(0)
	expect(t, fe, r, 0, out, "indirect")
}

// A buffer may lie across two regions that meet.
func TestRegionsMeet(t *testing.T) {
	f := serve(t)
	fe := vhosttest.Dial(t, f.path, memSize)
	fe.Negotiate(0)
	fe.SetMemory(4)
	r := fe.NewRing(0, num, 0)
	r.Start()
	in, out := memSize/4-3, memSize/2-5
	copy(fe.Mem[in:], "across the border")
	r.SetDesc(0, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(in), Len: 17, Flags: vhosttest.Next, Next: 1})
	r.SetDesc(1, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(out), Len: 17, Flags: vhosttest.Write})
	r.Offer(0)
	expect(t, fe, r, 0, out, "across the border")
}

func TestConfigAndStatus(t *testing.T) {
	f := serve(t)
	fe := vhosttest.Dial(t, f.path, memSize)
	fe.Negotiate(0)
	get := func(off, size uint32) string {
		p := append(vhosttest.U32(off, size, 0), make([]byte, size)...)
		b := fe.Ask(vhosttest.GetConfig, p)
		if len(b) == 0 {
			return "refused"
		}
		return string(b[12:])
	}
	if got := get(6, 7); got != "uration" {
		t.Errorf("configuration at 6 is %q", got)
	}
	if got := get(6, 8); got != "refused" {
		t.Errorf("configuration behind the end is %q", got)
	}
	fe.Do(vhosttest.SetStatus, vhosttest.U64(7))
	if b := fe.Ask(vhosttest.GetStatus, nil); binary.LittleEndian.Uint64(b) != 7 {
		t.Errorf("status is %x", b)
	}
	if b := fe.Ask(vhosttest.GetQueueNum, nil); binary.LittleEndian.Uint64(b) != 2 {
		t.Errorf("queues: %x", b)
	}
}

// What changes the memory must not look like a stop to the device.
func TestPauseIsNoStop(t *testing.T) {
	f := serve(t)
	fe, r := start(t, f, 0)
	echo(t, fe, r, "before")
	fe.SetMemory(1)
	echo(t, fe, r, "after SET_MEM_TABLE")
	fe.SetMemory(2)
	fe.Do(vhosttest.SetVringEnable, vhosttest.U32(0, 0))
	fe.Do(vhosttest.SetVringEnable, vhosttest.U32(0, 1))
	echo(t, fe, r, "after disable")
	r.Start() // again: nothing to do
	if served, stopped := f.dev.counts(); served != 4 || stopped != 0 {
		t.Errorf("served %d times, stopped %d times; want 4, 0", served, stopped)
	}
	if fe.Ack(vhosttest.SetMemTable, vhosttest.U32(0, 0)) == 0 {
		t.Error("a ring without memory was started again")
	}
	if _, stopped := f.dev.counts(); stopped != 0 {
		t.Errorf("losing the memory stopped the device")
	}
}

func TestRemoveRegion(t *testing.T) {
	f := serve(t)
	fe, r := start(t, f, 0)
	echo(t, fe, r, "before")
	if fe.Ack(vhosttest.RemMemReg, fe.Region()) == 0 {
		t.Error("a ring without memory was started again")
	}
	if _, stopped := f.dev.counts(); stopped != 0 {
		t.Error("REM_MEM_REG stopped the device")
	}
	fe.AddMemory()
	fe.Do(vhosttest.SetVringEnable, vhosttest.U32(0, 1))
	echo(t, fe, r, "after")
}

func TestStopAndRestart(t *testing.T) {
	f := serve(t)
	fe, r := start(t, f, 0)
	echo(t, fe, r, "one")
	echo(t, fe, r, "two")
	if base := r.Stop(); base != 2 {
		t.Errorf("stopped at index %d, want 2", base)
	}
	if _, stopped := f.dev.counts(); stopped != 1 {
		t.Errorf("the device was told %d times", stopped)
	}
	r.Restart()
	echo(t, fe, r, "three")
	fe.Do(vhosttest.ResetDevice, nil)
	if _, stopped := f.dev.counts(); stopped != 2 {
		t.Errorf("reset: the device was told %d times", stopped)
	}
	r.Restart()
	echo(t, fe, r, "four")
	fe.Do(vhosttest.SetStatus, vhosttest.U64(0))
	if _, stopped := f.dev.counts(); stopped != 3 {
		t.Errorf("status 0: the device was told %d times", stopped)
	}
}

// One VMM after another; the first one dies without a word.
func TestNextConnection(t *testing.T) {
	f := serve(t)
	for i := range 3 {
		fe, r := start(t, f, 0)
		echo(t, fe, r, "hello")
		if err := fe.Conn.Close(); err != nil {
			t.Fatal(err)
		}
		_ = i
	}
}

func TestBrokenRings(t *testing.T) {
	const mem = vhosttest.GuestBase
	for name, breakIt := range map[string]func(fe *vhosttest.Frontend, r *vhosttest.Ring){
		"index runs ahead": func(_ *vhosttest.Frontend, r *vhosttest.Ring) { r.SetAvailIdx(3 * num); r.Kick() },
		"head":             func(_ *vhosttest.Frontend, r *vhosttest.Ring) { r.Offer(num) },
		"address": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: 0xffff_ffff_ffff_fff0, Len: 0xffff_ffff})
			r.Offer(0)
		},
		"behind the end": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: mem + memSize - 1, Len: 2})
			r.Offer(0)
		},
		"loop": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: mem, Len: 1, Flags: vhosttest.Next, Next: 0})
			r.Offer(0)
		},
		"next": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: mem, Len: 1, Flags: vhosttest.Next, Next: num})
			r.Offer(0)
		},
		"order": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: mem, Len: 1, Flags: vhosttest.Next | vhosttest.Write, Next: 1})
			r.SetDesc(1, vhosttest.Desc{Addr: mem, Len: 1})
			r.Offer(0)
		},
		"indirect in indirect": func(fe *vhosttest.Frontend, r *vhosttest.Ring) {
			d := vhosttest.Desc{Addr: mem + bufs, Len: 16, Flags: vhosttest.Indirect}
			vhosttest.PutDesc(fe.Mem[bufs:], d)
			r.SetDesc(0, d)
			r.Offer(0)
		},
		"loop in indirect": func(fe *vhosttest.Frontend, r *vhosttest.Ring) {
			vhosttest.PutDesc(fe.Mem[bufs:], vhosttest.Desc{Addr: mem, Len: 1, Flags: vhosttest.Next})
			r.SetDesc(0, vhosttest.Desc{Addr: mem + bufs, Len: 16, Flags: vhosttest.Indirect})
			r.Offer(0)
		},
		"indirect size": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: mem, Len: 15, Flags: vhosttest.Indirect})
			r.Offer(0)
		},
		"indirect huge": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: mem, Len: 0xffff_fff0, Flags: vhosttest.Indirect})
			r.Offer(0)
		},
		"flags": func(_ *vhosttest.Frontend, r *vhosttest.Ring) {
			r.SetDesc(0, vhosttest.Desc{Addr: mem, Len: 1, Flags: 0x80})
			r.Offer(0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := serve(t)
			fe, r := start(t, f, 0)
			other := fe.NewRing(1, num, vhosttest.RingBytes(num))
			other.Start()
			echo(t, fe, r, "good")
			breakIt(fe, r)
			if err := <-f.broken; err == nil {
				t.Error("broken without a reason")
			}
			// The whole device stands still, and stopping it does not hang.
			other.SetDesc(0, vhosttest.Desc{Addr: mem + bufs, Len: 1})
			other.Offer(0)
			if _, _, ok := other.WaitUsed(50); ok {
				t.Error("the other queue goes on")
			}
			r.Stop()
			other.Stop()
			r.Restart()
			echo(t, fe, r, "mended")
		})
	}
}

// The guest hears of a broken ring through the error descriptor.
func TestErrorDescriptor(t *testing.T) {
	f := serve(t)
	fe, r := start(t, f, 0)
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	fe.Do(vhosttest.SetVringErr, vhosttest.U64(0), fd)
	r.Offer(num)
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, wait); n != 1 || err != nil {
		t.Fatal(n, err)
	}
}

func TestBadMessagesEndTheConnection(t *testing.T) {
	const version2 = 3 // added to 1: version 0
	for name, send := range map[string]func(fe *vhosttest.Frontend) error{
		"huge":        func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.SetOwner, 0, make([]byte, 5000)) },
		"flags":       func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.SetOwner, 1<<4, nil) },
		"version":     func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.SetOwner, version2, nil) },
		"short":       func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.SetFeatures, 0, []byte{1}) },
		"features":    func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.SetFeatures, 0, vhosttest.U64(1<<63)) },
		"queue":       func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.SetVringNum, 0, vhosttest.U32(2, 16)) },
		"size":        func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.SetVringNum, 0, vhosttest.U32(0, 17)) },
		"no fd":       func(fe *vhosttest.Frontend) error { return fe.Send(vhosttest.AddMemReg, 0, fe.Region()) },
		"unsupported": func(fe *vhosttest.Frontend) error { return fe.Send(999, 0, nil) },
		"region": func(fe *vhosttest.Frontend) error {
			return fe.Send(vhosttest.AddMemReg, 0, vhosttest.U64(0, ^uint64(0), 4096, 0, 0), 0)
		},
		"many fds": func(fe *vhosttest.Frontend) error {
			return fe.Send(vhosttest.SetOwner, 0, nil, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := serve(t)
			fe := vhosttest.Dial(t, f.path, memSize)
			if err := send(fe); err != nil {
				t.Fatal(err)
			}
			if p, err := fe.Reply(); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
				t.Fatalf("reply %x, %v; want the end", p, err)
			}
			fe2, r := start(t, f, 0)
			echo(t, fe2, r, "next")
		})
	}
}

// A regular file as memory that is too short would be SIGBUS later.
func TestShortMemoryFile(t *testing.T) {
	f := serve(t)
	fe := vhosttest.Dial(t, f.path, memSize)
	fe.Negotiate(0)
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := fe.Send(vhosttest.AddMemReg, 0, fe.Region(), int(file.Fd())); err != nil {
		t.Fatal(err)
	}
	if _, err := fe.Reply(); err == nil {
		t.Error("a region behind the end of its file was accepted")
	}
}

func TestListenerFromFD(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	file, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(file.Close(), l.Close()); err != nil {
		t.Fatal(err)
	}
	// Closing l removed the socket's name, the inherited descriptor still serves.
	l2, err := vhostuser.ListenerFromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	if err := l2.Close(); err != nil {
		t.Error(err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := vhostuser.ListenerFromFD(null); err == nil {
		t.Error("/dev/null was accepted as a listener")
	}
}
