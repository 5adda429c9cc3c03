package vhostuser_test

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// keeper holds all chains until it must let go. Then it answers them where it is to
// drain, else keeps them, those that it took last first.
type keeper struct {
	mu      sync.Mutex
	drained []bool
	took    chan int // chains held
}

func (k *keeper) Serve(_ int, q *vhostuser.Queue) {
	var held []*vhostuser.Chain
	defer func() { k.release(q, held) }()
	for {
		c := &vhostuser.Chain{}
		ok, err := q.Pop(c)
		if err != nil {
			return
		}
		if ok {
			held = append(held, c)
			k.took <- len(held)
			continue
		}
		if !q.Wait() {
			return
		}
	}
}

func (k *keeper) release(q *vhostuser.Queue, held []*vhostuser.Chain) {
	<-q.Halted()
	drain := q.Draining()
	k.mu.Lock()
	k.drained = append(k.drained, drain)
	k.mu.Unlock()
	for i := len(held) - 1; i >= 0; i-- {
		if drain {
			q.Push(held[i], 0)
		} else {
			q.Keep(held[i])
		}
	}
	q.Notify()
}

func (k *keeper) Stopped(int) {}

func keep(t *testing.T) (*keeper, *vhosttest.Frontend, *vhosttest.Ring, chan error) {
	t.Helper()
	k := &keeper{took: make(chan int, 1000)}
	broken := make(chan error, 1)
	srv, err := vhostuser.New(vhostuser.Config{Device: k, Queues: 1, Broken: func(err error) { broken <- err }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err == nil {
			err = srv.ServeConn(t.Context(), c)
		}
		done <- errors.Join(err, l.Close())
	}()
	fe := vhosttest.Dial(t, l.Addr().String(), memSize)
	t.Cleanup(func() {
		_ = fe.Conn.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	fe.Negotiate(0)
	fe.AddMemory()
	r := fe.NewRing(0, num, 0)
	for i := range num {
		r.SetDesc(i, vhosttest.Desc{Addr: vhosttest.GuestBase + bufs, Len: 8})
	}
	r.Start()
	return k, fe, r, broken
}

// Chains without an answer survive every change of the memory, in any number, and
// are answered when the queue is disabled.
func TestKeep(t *testing.T) {
	k, fe, r, _ := keep(t)
	for i := range uint16(5) {
		r.Queue(i)
	}
	r.Kick()
	await(k, 5)
	for parts := range 3 {
		fe.SetMemory(1 << parts)
		await(k, 5)
	}
	r.Offer(5)
	await(k, 6)
	fe.Do(vhosttest.SetVringEnable, vhosttest.U32(0, 0))
	for seen := map[uint16]bool{}; len(seen) < 6; {
		head, _, ok := r.WaitUsed(wait)
		if !ok || head > 5 || seen[head] {
			t.Fatalf("chain %d, %v, after %v", head, ok, seen)
		}
		seen[head] = true
	}
	if base := r.Stop(); base != 6 {
		t.Errorf("stopped at %d", base)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if want := []bool{false, false, false, true}; len(k.drained) != len(want) || !k.drained[3] || k.drained[0] {
		t.Errorf("told to drain: %v", k.drained)
	}
}

func await(k *keeper, n int) {
	for <-k.took != n {
	}
}

// What a paused queue kept is not served after a reset: the memory belongs to
// another boot.
func TestResetForgets(t *testing.T) {
	k, fe, r, _ := keep(t)
	r.Offer(0)
	await(k, 1)
	fe.SetMemory(1)
	await(k, 1)
	fe.Do(vhosttest.ResetDevice, nil)
	r.Restart()
	r.SetDesc(3, vhosttest.Desc{Addr: vhosttest.GuestBase + bufs, Len: 8})
	r.Offer(3)
	await(k, 1)
	r.Stop()
	if head, _, ok := r.WaitUsed(wait); head != 3 || !ok {
		t.Errorf("chain %d, %v", head, ok)
	}
	if _, _, ok := r.Used(); ok {
		t.Error("one chain too many")
	}
}

// A guest that offers its chains again and again without waiting for answers would
// make the device hold any number of them.
func TestTooManyChains(t *testing.T) {
	k, _, r, broken := keep(t)
	for range num {
		r.Offer(0)
	}
	await(k, num)
	r.Offer(0)
	if err := <-broken; !strings.Contains(err.Error(), "without an answer") {
		t.Error(err)
	}
}
