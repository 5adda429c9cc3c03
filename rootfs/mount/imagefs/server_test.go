package imagefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// fakeKernel feeds a server with requests and takes its replies.
type fakeKernel struct {
	requests chan []byte
	stopped  chan struct{}
	stopOnce sync.Once
	replies  chan reply
}

type reply struct {
	unique uint64
	errno  syscall.Errno
	data   []byte
}

func newKernel() *fakeKernel {
	return &fakeKernel{requests: make(chan []byte), stopped: make(chan struct{}), replies: make(chan reply, 1000)}
}

func (k *fakeKernel) Receive(buf []byte) (int, error) {
	select {
	case r, ok := <-k.requests:
		if !ok {
			return 0, errors.New("session is over")
		}
		return copy(buf, r), nil
	case <-k.stopped:
		return 0, os.ErrDeadlineExceeded
	}
}

func (k *fakeKernel) Stop() { k.stopOnce.Do(func() { close(k.stopped) }) }

func (k *fakeKernel) Reply(unique uint64, head, payload []byte) error {
	all := append(bytes.Clone(head), payload...)
	if int(binary.NativeEndian.Uint32(all)) != len(all) || binary.NativeEndian.Uint64(all[8:]) != unique {
		panic("reply header does not fit")
	}
	k.replies <- reply{unique, syscall.Errno(-replyError(all)), all[outHeaderSize:]}
	return nil
}

// message builds a request of words of 64 bits.
func message(opcode uint32, unique, node uint64, args ...uint64) []byte {
	b := make([]byte, inHeaderSize, inHeaderSize+8*len(args))
	binary.NativeEndian.PutUint32(b[4:], opcode)
	binary.NativeEndian.PutUint64(b[8:], unique)
	binary.NativeEndian.PutUint64(b[16:], node)
	for _, a := range args {
		b = binary.NativeEndian.AppendUint64(b, a)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// read is fuse_read_in: handle, offset, size and flags, owner, flags.
func read(unique, node, off, size uint64) []byte {
	return message(opRead, unique, node, 0, off, size, 0, 0)
}

func lookup(unique uint64, name string) []byte {
	b := append(message(1, unique, 1), name+"\x00"...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// offer is an INIT request of protocol 7.40.
func offer() []byte {
	b := message(26, 2, 0, 7|40<<32, 128<<10|0xffffffff<<32, 0, 0, 0, 0, 0, 0)
	return b
}

type funcFile struct {
	size int64
	read func(ctx context.Context, p []byte, off int64) (int, error)
}

func (f funcFile) Size() int64 { return f.size }
func (f funcFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return f.read(ctx, p, off)
}

func fill(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = byte(off+int64(i)) + byte((off+int64(i))>>12)
	}
	return len(p), nil
}

func serve(t *testing.T, cfg Config) (*Server, *fakeKernel, func() error) {
	t.Helper()
	k := newKernel()
	cfg.Link, cfg.Offer = k, offer()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	stop := sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = stop() })
	return s, k, stop
}

func (k *fakeKernel) ask(t *testing.T, msg []byte) reply {
	t.Helper()
	k.requests <- msg
	return <-k.replies
}

func TestReads(t *testing.T) {
	s, k, _ := serve(t, Config{})
	const size = 1<<20 + 4096
	file := funcFile{size, func(_ context.Context, p []byte, off int64) (int, error) {
		n, _ := fill(p, off)
		if off+int64(n) == size {
			return n, io.EOF // as io.ReaderAt may
		}
		return n, nil
	}}
	if err := s.Add(Node{ID: 5, Name: "five", File: file}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name            string
		off, size, want uint64
	}{
		{"start", 0, 4096, 4096}, {"odd", 123, 4567, 4567}, {"largest", 4096, 1 << 20, 1 << 20},
		{"over the end", size - 100, 4096, 100}, {"behind the end", size, 4096, 0}, {"far behind", 1 << 63, 4096, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := k.ask(t, read(10, 5, tc.off, tc.size))
			want := make([]byte, tc.want)
			_, _ = fill(want, int64(tc.off))
			if r.errno != 0 || !bytes.Equal(r.data, want) {
				t.Errorf("errno %v, %d bytes, want %d", r.errno, len(r.data), tc.want)
			}
		})
	}
	if r := k.ask(t, read(12, 6, 0, 4096)); r.errno != syscall.ESTALE {
		t.Errorf("read of an unknown node: %v", r.errno)
	}
}

func TestNames(t *testing.T) {
	s, k, _ := serve(t, Config{})
	file := funcFile{8192, func(_ context.Context, p []byte, off int64) (int, error) { return fill(p, off) }}
	if err := s.Add(Node{ID: 7, Name: "seven", File: file}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []Node{{ID: 7, Name: "x", File: file}, {ID: 8, Name: "seven", File: file}, {ID: 1, Name: "y", File: file}, {ID: 9, Name: "", File: file}, {ID: 9, Name: "z"}} {
		if s.Add(n) == nil {
			t.Errorf("node %d %q was added", n.ID, n.Name)
		}
	}
	r := k.ask(t, lookup(10, "seven"))
	if r.errno != 0 || binary.NativeEndian.Uint64(r.data) != 7 || binary.NativeEndian.Uint64(r.data[16:]) < 300*86400 {
		t.Errorf("lookup: %+v", r)
	}
	if r := k.ask(t, lookup(12, "eight")); r.errno != syscall.ENOENT {
		t.Errorf("lookup of nothing must be an error, not a negative entry: %+v", r)
	}
	open := message(14, 14, 7, 0)
	if r := k.ask(t, open); r.errno != 0 || binary.NativeEndian.Uint32(r.data[8:])&fuse.FOPEN_DIRECT_IO == 0 {
		t.Errorf("open: %+v", r)
	}
	s.Seal(7)
	if r := k.ask(t, open); r.errno != syscall.EBUSY {
		t.Errorf("open of a sealed file: %v", r.errno)
	}
	s.Remove(7)
	if r := k.ask(t, lookup(16, "seven")); r.errno != syscall.ENOENT {
		t.Errorf("lookup of a removed file: %v", r.errno)
	}
}

func TestFailures(t *testing.T) {
	s, k, _ := serve(t, Config{})
	var fail error
	short := false
	file := funcFile{8192, func(_ context.Context, p []byte, off int64) (int, error) {
		if fail != nil {
			return 0, fail
		}
		if short {
			p = p[:10]
		}
		return fill(p, off)
	}}
	if err := s.Add(Node{ID: 2, Name: "f", File: file}); err != nil {
		t.Fatal(err)
	}
	fail = errors.New("boom")
	if r := k.ask(t, read(10, 2, 0, 4096)); r.errno != syscall.EIO {
		t.Errorf("failed read: %v", r.errno)
	}
	fail, short = nil, true
	if r := k.ask(t, read(12, 2, 0, 4096)); r.errno != syscall.EIO {
		t.Errorf("short read: %v, zeros must never be made up", r.errno)
	}
	short = false
	if r := k.ask(t, read(14, 2, 0, 4096)); r.errno != 0 {
		t.Errorf("read after failures: %v", r.errno)
	}
	if st := s.Stats(); st.Failures != 2 || st.Reads != 1 || st.ReadBytes != 4096 {
		t.Errorf("stats %+v", st)
	}
}

// hanging is a file whose reads wait for their context.
func hanging() (funcFile, chan struct{}) {
	entered := make(chan struct{}, 1000)
	return funcFile{1 << 30, func(ctx context.Context, _ []byte, _ int64) (int, error) {
		entered <- struct{}{}
		<-ctx.Done()
		return 0, ctx.Err()
	}}, entered
}

func TestInterrupt(t *testing.T) {
	s, k, _ := serve(t, Config{Requests: 1})
	f, entered := hanging()
	var killed atomic.Bool
	s.dying = func(uint32) bool { return killed.Load() }
	if err := s.Add(Node{ID: 2, Name: "f", File: f}); err != nil {
		t.Fatal(err)
	}
	k.requests <- read(10, 2, 0, 4096)
	<-entered
	k.requests <- message(opInterrupt, 11, 2, 10)
	if r := k.ask(t, lookup(20, "f")); r.unique != 20 {
		t.Errorf("a signal that does not kill ended a read: %+v", r)
	}
	killed.Store(true)
	k.requests <- read(12, 2, 0, 4096) // waits for its turn
	k.requests <- message(opInterrupt, 13, 2, 12)
	if r := <-k.replies; r.unique != 12 || r.errno != syscall.EINTR {
		t.Errorf("interrupted while it waited for its turn: %+v", r)
	}
	k.requests <- message(opInterrupt, 99, 2, 98) // of nothing: no reply
	k.requests <- message(opInterrupt, 11, 2, 10)
	if r := <-k.replies; r.unique != 10 || r.errno != syscall.EINTR {
		t.Errorf("interrupted while it ran: %+v", r)
	}
}

func TestAbortAndRemove(t *testing.T) {
	s, k, _ := serve(t, Config{})
	f, entered := hanging()
	if err := s.Add(Node{ID: 2, Name: "f", File: f}); err != nil {
		t.Fatal(err)
	}
	k.requests <- read(10, 2, 0, 4096)
	<-entered
	s.Abort(2)
	if r := <-k.replies; r.errno != syscall.EIO {
		t.Errorf("aborted read: %v", r.errno)
	}
	if r := k.ask(t, read(12, 2, 0, 4096)); r.errno != syscall.EIO {
		t.Errorf("read after abort: %v", r.errno)
	}
	f, entered = hanging()
	if err := s.Add(Node{ID: 3, Name: "g", File: f}); err != nil {
		t.Fatal(err)
	}
	k.requests <- read(14, 3, 0, 4096)
	<-entered
	s.Remove(3) // returns only after the read
	if r := <-k.replies; r.errno != syscall.EIO {
		t.Errorf("read of a removed file: %v", r.errno)
	}
}

// What is under way when the server stops is left to the next worker.
func TestStopLeavesRequests(t *testing.T) {
	s, k, stop := serve(t, Config{Requests: 2})
	f, entered := hanging()
	if err := s.Add(Node{ID: 2, Name: "f", File: f}); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(5) {
		k.requests <- read(10+2*i, 2, 0, 1<<20)
	}
	<-entered
	<-entered
	if err := stop(); err != nil {
		t.Errorf("serve: %v", err)
	}
	select {
	case r := <-k.replies:
		t.Errorf("request was answered with %v although the next worker will serve it", r.errno)
	default:
	}
	if s.buffers.mapped != 0 {
		t.Errorf("%d bytes of buffers are still mapped", s.buffers.mapped)
	}
}

func TestReleaseIsToldBeforeTheAnswer(t *testing.T) {
	told := make(chan uint64, 1)
	_, k, _ := serve(t, Config{Released: func(node uint64) { told <- node }})
	r := k.ask(t, message(opRelease, 10, 42, 0, 0, 0))
	if r.errno != 0 {
		t.Errorf("release: %v", r.errno)
	}
	select {
	case n := <-told:
		if n != 42 {
			t.Errorf("told of node %d", n)
		}
	default:
		t.Error("answered before it was told")
	}
}

func TestServeReturnsSessionEnd(t *testing.T) {
	_, k, stop := serve(t, Config{})
	close(k.requests)
	if err := stop(); err == nil {
		t.Error("end of the session is not returned")
	}
}

func FuzzRequests(f *testing.F) {
	f.Add(read(10, 2, 0, 4096))
	f.Add(lookup(10, "f"))
	f.Add(message(opInterrupt, 11, 2, 10))
	f.Add(message(opGetxattr, 10, 2, 64<<10))
	f.Add(message(opReaddir, 10, 1, 0, 0, 4096, 0, 0))
	f.Add(message(opRelease, 10, 2, 0, 0, 0))
	k := newKernel()
	s, err := New(Config{Link: k, Offer: offer()})
	if err != nil {
		f.Fatal(err)
	}
	file := funcFile{8192, func(_ context.Context, p []byte, off int64) (int, error) { return fill(p, off) }}
	if err := s.Add(Node{ID: 2, Name: "f", File: file}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > requestSize {
			return
		}
		s.dispatch(t.Context(), b, newNow(s))
		s.handlers.Wait()
		for len(k.replies) > 0 {
			<-k.replies
		}
	})
}
