package vhostuser_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
	"golang.org/x/sys/unix"
)

// The processes with the device are this program: with key set, it serves the
// connection that is its descriptor 3.
const backendKey = "TATAMI_TEST_BACKEND"

func TestMain(m *testing.M) {
	if os.Getenv(backendKey) == "" {
		os.Exit(m.Run())
	}
	if err := serveOnce(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func serveOnce() error {
	c, err := net.FileConn(os.NewFile(3, "vmm"))
	if err != nil {
		return err
	}
	s, err := vhostuser.New(vhostuser.Config{Device: &shuffler{}, Queues: 2})
	if err != nil {
		return err
	}
	return s.ServeConn(context.Background(), c.(*net.UnixConn))
}

// shuffler answers many requests at a time, in any order: with the number that is in
// the request, plus one.
type shuffler struct{}

func (*shuffler) Stopped(int) {}

func (*shuffler) Serve(_ int, q *vhostuser.Queue) {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		c := &vhostuser.Chain{}
		ok, err := q.Pop(c)
		if err != nil {
			return
		}
		if !ok {
			if !q.Wait() {
				return
			}
			continue
		}
		running.Go(func() {
			if n := rand.IntN(4); n > 0 {
				time.Sleep(time.Duration(n*rand.IntN(300)) * time.Microsecond)
			}
			var b [8]byte
			vhostuser.CopyOut(b[:], c.Readable)
			n, _ := vhostuser.CopyIn(c.Writable, binary.LittleEndian.AppendUint64(nil, binary.LittleEndian.Uint64(b[:])+1))
			q.Push(c, n)
			q.Notify()
		})
	}
}

// backends starts processes.
type backends struct {
	t *testing.T

	mu    sync.Mutex
	cmd   *exec.Cmd
	ended chan struct{}
	count int
	limit int // 0 for none
}

var errEnough = errors.New("enough")

func (b *backends) start(context.Context) (*vhostuser.Backend, error) {
	b.kill()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.count++; b.limit > 0 && b.count > b.limit {
		return nil, errEnough
	}
	ours, theirs := socketpair(b.t)
	defer theirs.Close()
	b.cmd = exec.Command("/proc/self/exe")
	b.cmd.Env = append(os.Environ(), backendKey+"=1")
	b.cmd.ExtraFiles = []*os.File{theirs}
	b.cmd.Stdout, b.cmd.Stderr = os.Stdout, os.Stderr
	if err := b.cmd.Start(); err != nil {
		return nil, err
	}
	b.ended = make(chan struct{})
	cmd, ended := b.cmd, b.ended
	go func() {
		_ = cmd.Wait() // it is killed
		close(ended)
	}()
	return &vhostuser.Backend{Conn: ours, Ended: ended}, nil
}

// kill ends the process that runs, and waits for it.
func (b *backends) kill() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cmd != nil {
		_ = b.cmd.Process.Kill() // it may have ended
		<-b.ended
	}
}

func socketpair(t *testing.T) (*net.UnixConn, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "ours")
	c, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn), os.NewFile(uintptr(fds[1]), "theirs")
}

// relayed is a VMM whose device is behind a Relay.
func relayed(t *testing.T, b *backends) (fe *vhosttest.Frontend, done <-chan error) {
	t.Helper()
	vmm, f := socketpair(t)
	dev, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	r := vhostuser.Relay{Start: b.start, Queues: 2}
	ended := make(chan error, 1)
	go func() {
		ended <- r.Run(t.Context(), dev.(*net.UnixConn))
		b.kill()
	}()
	fe = vhosttest.New(t, vmm, 1<<20)
	return fe, ended
}

// driver keeps a ring busy and checks every answer.
type driver struct {
	t    *testing.T
	fe   *vhosttest.Frontend
	ring *vhosttest.Ring
	data int // where in memory: 16 bytes for each chain
	out  map[uint16]uint64
	next uint64
	done func() // told of each answer; may be nil
}

const chains = 32

func newDriver(t *testing.T, fe *vhosttest.Frontend, index int) *driver {
	d := &driver{t: t, fe: fe, ring: fe.NewRing(index, 2*chains, index*0x10000), data: 0x80000 + index*0x10000, out: map[uint16]uint64{}}
	d.ring.Start()
	return d
}

func (d *driver) offer(head uint16) {
	at := d.data + 16*int(head)
	d.next++
	d.out[head] = d.next
	binary.LittleEndian.PutUint64(d.fe.Mem[at:], d.next)
	clear(d.fe.Mem[at+8 : at+16])
	d.ring.SetDesc(int(head), vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(at), Len: 8, Flags: vhosttest.Next, Next: head + 1})
	d.ring.SetDesc(int(head)+1, vhosttest.Desc{Addr: vhosttest.GuestBase + uint64(at) + 8, Len: 8, Flags: vhosttest.Write})
	d.ring.Offer(head)
}

// take waits for one answer; false is an error, which was reported.
func (d *driver) take() (uint16, bool) {
	head, n, ok := d.ring.WaitUsed(60_000)
	want, outstanding := d.out[head]
	got := binary.LittleEndian.Uint64(d.fe.Mem[d.data+16*int(head)+8:])
	if !ok || !outstanding || n != 8 || got != want+1 {
		d.t.Errorf("answer of chain %d: %t, outstanding %t, %d bytes, %d for %d", head, ok, outstanding, n, got, want)
		return 0, false
	}
	delete(d.out, head)
	if d.done != nil {
		d.done()
	}
	return head, true
}

// run makes n requests, as many at a time as there are chains.
func (d *driver) run(n int) {
	for i := range chains {
		d.offer(uint16(2 * i))
	}
	for i := range n {
		head, ok := d.take()
		if !ok {
			return
		}
		if i+chains < n {
			d.offer(head)
		}
	}
	if head, _, ok := d.ring.Used(); ok || len(d.out) > 0 {
		d.t.Errorf("%d chains have no answer, and chain %d one too many: %t", len(d.out), head, ok)
	}
}

// Processes that are killed all the time answer every request of two queues, each
// once.
func TestRelayKills(t *testing.T) {
	b := &backends{t: t}
	fe, done := relayed(t, b)
	fe.Negotiate(0)
	fe.SetMemory(2)
	ds := []*driver{newDriver(t, fe, 0), newDriver(t, fe, 1)}
	// Each process answers something, or it would take for ever.
	var left atomic.Int64
	kills := make(chan struct{}, 1)
	left.Store(50)
	answered := func() {
		if left.Add(-1) == 0 {
			left.Store(rand.Int64N(500) + 1)
			select {
			case kills <- struct{}{}:
			default: // one is on its way
			}
		}
	}
	var killing, driving sync.WaitGroup
	killing.Go(func() {
		for range kills {
			b.kill()
		}
	})
	for _, d := range ds {
		d.done = answered
		driving.Go(func() { d.run(10_000) })
	}
	driving.Wait()
	close(kills)
	killing.Wait()
	b.mu.Lock()
	t.Logf("%d processes", b.count)
	if b.count < 20 {
		t.Errorf("only %d processes", b.count)
	}
	b.mu.Unlock()
	if err := fe.Conn.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What the VMM does between kills, each process does as well: memory that comes and
// goes, rings that stop and start anew.
func TestRelayState(t *testing.T) {
	b := &backends{t: t}
	fe, done := relayed(t, b)
	fe.Negotiate(0)
	b.kill()
	fe.AddMemory()
	b.kill()
	fe.Do(vhosttest.RemMemReg, fe.Region())
	b.kill()
	fe.AddMemory()
	b.kill()
	d := newDriver(t, fe, 1)
	for parts := range 3 {
		b.kill()
		d.run(100)
		b.kill()
		fe.SetMemory(1 << parts)
		b.kill()
		d.run(100)
		b.kill()
		if base := d.ring.Stop(); base != 200 {
			t.Errorf("stopped at %d", base)
		}
		b.kill()
		d.ring.Restart()
	}
	fe.Do(vhosttest.ResetDevice, nil)
	b.kill()
	d.ring.Restart()
	b.kill()
	d.run(100)
	if got := binary.LittleEndian.Uint64(fe.Ask(vhosttest.GetFeatures, nil)); got == 0 {
		t.Error("no features")
	}
	if err := fe.Conn.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestRelayGivesUp(t *testing.T) {
	b := &backends{t: t, limit: 3}
	fe, done := relayed(t, b)
	fe.Negotiate(0)
	for range b.limit {
		b.kill()
		time.Sleep(20 * time.Millisecond) // until the next runs, or is on its way
	}
	b.kill()
	for {
		select {
		case err := <-done:
			if !errors.Is(err, errEnough) {
				t.Error(err)
			}
			if _, err := fe.Conn.Read(make([]byte, 1)); err == nil || errors.Is(err, syscall.EAGAIN) {
				t.Errorf("the VMM sees %v", err)
			}
			return
		case <-time.After(10 * time.Millisecond):
			b.kill()
		}
	}
}
