package sharedimages

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// pair is a connection as NewConn takes it, and the other end.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { _ = c.Close() }) // it may be closed
	}
	return ends[0], ends[1]
}

func newConn(t *testing.T, c *net.UnixConn, stall time.Duration) *Conn {
	t.Helper()
	conn, err := NewConn(c, stall)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func temp(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestMessagesWithFiles(t *testing.T) {
	x, y := pair(t)
	a, b := newConn(t, x, time.Minute), newConn(t, y, time.Minute)
	f := temp(t)
	data := bytes.Repeat([]byte("d"), MaxData)
	want := Header{Op: Share, ID: 9, Off: 4096}
	if err := a.Send(&want, data, f, f); err != nil {
		t.Fatal(err)
	}
	h, payload, files, err := b.Receive(make([]byte, MaxPacket), true)
	if err != nil || h != want || !bytes.Equal(payload, data) || len(files) != 2 {
		t.Fatalf("%+v, %d bytes, %d files, %v", h, len(payload), len(files), err)
	}
	for _, got := range files {
		one, err1 := f.Stat()
		two, err2 := got.Stat()
		if errors.Join(err1, err2) != nil || !os.SameFile(one, two) {
			t.Errorf("another file came: %v, %v", err1, err2)
		}
	}
	closeAll(files)
}

// A peer that sends what it may not loses the connection, and its descriptors are
// not kept.
func TestHostilePeer(t *testing.T) {
	fds := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	f := temp(t)
	three := unix.UnixRights(int(f.Fd()), int(f.Fd()), int(f.Fd()))
	good := packet(Header{Op: Bye}, nil)
	for _, tc := range []struct {
		name   string
		packet []byte
		oob    []byte
		want   bool // descriptors
	}{
		{"no message", []byte("x"), nil, true},
		{"nothing", []byte{}, nil, true},
		{"long", append(good, make([]byte, MaxData+1)...), nil, true},
		{"no message, files", []byte("x"), unix.UnixRights(int(f.Fd())), true},
		{"files", good, unix.UnixRights(int(f.Fd())), false},
		{"many files", good, three, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x, y := pair(t)
			b := newConn(t, y, time.Minute)
			if err := x.SetWriteBuffer(4 * MaxPacket); err != nil {
				t.Fatal(err)
			}
			before := fds()
			if _, _, err := x.WriteMsgUnix(tc.packet, tc.oob, nil); err != nil {
				t.Fatal(err)
			}
			if h, _, _, err := b.Receive(make([]byte, MaxPacket), tc.want); err == nil {
				t.Errorf("took %+v", h)
			}
			if n := fds(); n != before-1 { // the connection
				t.Errorf("%d descriptors, %d before", n, before)
			}
		})
	}
}

// One that does not listen does not hold up the sender.
func TestStall(t *testing.T) {
	x, _ := pair(t)
	a := newConn(t, x, 50*time.Millisecond)
	data := make([]byte, MaxData)
	var err error
	for n := 0; err == nil; n++ {
		if n > 1000 {
			t.Fatal("all is taken by nobody")
		}
		err = a.Send(&Header{Op: Read}, data)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	if err := a.Send(&Header{Op: Read}, nil); err == nil {
		t.Error("the connection is still used")
	}
	if err := a.Send(&Header{Op: Read}, make([]byte, MaxData+1)); !errdefs.IsInvalidArgument(err) && !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestDial(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix(Network, &net.UnixAddr{Net: Network, Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answer := make(chan error, 1)
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			conn, err := NewConn(c, time.Minute)
			if err != nil {
				continue
			}
			h, payload, _, err := conn.Receive(make([]byte, MaxPacket), false)
			if err != nil || h.Op != Hello || h.N != Version || string(payload) != "box" {
				t.Errorf("hello %+v %q, %v", h, payload, err)
			}
			reply := Header{Op: Hello, N: Version}
			var text []byte
			if err := <-answer; err != nil {
				text = reply.Fail(err)
			}
			if err := conn.Send(&reply, text); err != nil {
				t.Error(err)
			}
		}
	}()
	answer <- nil
	c, err := Dial(t.Context(), path, "box")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answer <- errdefs.ErrPermissionDenied
	if c, err := Dial(t.Context(), path, "box"); !errdefs.IsPermissionDenied(err) {
		t.Error(c, err)
	}
	if c, err := Dial(t.Context(), path, ""); !errdefs.IsInvalidArgument(err) {
		t.Error(c, err)
	}
	if c, err := Dial(t.Context(), path+"none", "box"); !errors.Is(err, os.ErrNotExist) {
		t.Error(c, err)
	}
}
