package passthrough

import (
	"encoding/binary"
	"io"
	"log"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// slowFS is a file system of the node whose data comes when gate is closed.
type slowFS struct {
	kernelFS
	gate    chan struct{}
	waiting atomic.Int64
}

func (s *slowFS) Read(c <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	s.waiting.Add(1)
	<-s.gate
	return s.kernelFS.Read(c, in, buf)
}

// A file of the node that hangs, as a lazy image may whose registry does not answer,
// holds up nobody else.
func TestSlowFile(t *testing.T) {
	needRoot(t)
	a := newArena(t)
	slow, at := filepath.Join(a.base, "outside"), a.path("slow")
	must(t, os.Mkdir(at, 0o755), os.WriteFile(a.path("fast"), []byte("fast"), 0o644))
	s := &slowFS{kernelFS: kernelFS{open(t, slow, Options{})}, gate: make(chan struct{})}
	srv, err := fuse.NewServer(s, at, &fuse.MountOptions{DirectMountStrict: true, Logger: log.New(io.Discard, "", 0), DisableSplice: true,
		DisabledCapabilities: fuse.CAP_PASSTHROUGH})
	must(t, err)
	go srv.Serve()
	must(t, srv.WaitMount())
	t.Cleanup(func() {
		must(t, srv.Unmount())
		srv.Wait()
	})
	t.Run("guest", func(t *testing.T) { slowGuest(t, a, s) }) // has let go before the unmount
}

func slowGuest(t *testing.T, a *arena, s *slowFS) {
	g := bootDir(t, a.share, Options{})
	node := g.find("slow", "file")
	h, errno := g.open(node, syscall.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	const n = 20 // reads that hang
	msg := append(make([]byte, headerSize), vhosttest.U64(h, 0, 100, 0, 0)...)
	le := binary.LittleEndian
	le.PutUint32(msg[4:], opRead)
	le.PutUint64(msg[16:], node)
	copy(g.fe.Mem[inAt+1<<20:], msg)
	for i := range n {
		g.ring.SetDesc(2+2*i, vhosttest.Desc{Addr: vhosttest.GuestBase + inAt + 1<<20, Len: uint32(len(msg)), Flags: vhosttest.Next, Next: uint16(3 + 2*i)})
		g.ring.SetDesc(3+2*i, vhosttest.Desc{Addr: vhosttest.GuestBase + outAt + 1<<20 + 4096*uint64(i), Len: replySize + 100, Flags: vhosttest.Write})
		g.ring.Offer(uint16(2 + 2*i))
	}
	for range 50 {
		fast := g.find("fast")
		h, errno := g.open(fast, syscall.O_RDWR)
		if b, rerr := g.read(fast, h, 0, 4); errno != 0 || rerr != 0 || string(b) != "fast" {
			t.Fatalf("%v, %v: %q", errno, rerr, b)
		}
		if _, errno := g.call(opGetattr, node, make([]byte, 16), 104); errno != 0 {
			t.Fatalf("attributes of the slow file: %v", errno)
		}
	}
	close(s.gate)
	for range n {
		head, used, ok := g.ring.WaitUsed(wait)
		if got := string(g.fe.Mem[outAt+1<<20+4096*(int(head)-2)/2+replySize:][:len(secret)]); !ok || used != replySize+uint32(len(secret)) || got != secret {
			t.Fatalf("%d bytes, %v: %q", used, ok, got)
		}
	}
	if s.waiting.Load() == 0 {
		t.Error("nothing was slow")
	}
}
