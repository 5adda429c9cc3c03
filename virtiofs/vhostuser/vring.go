package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// vring is a queue as the front-end set it up. One goroutine, the session's, uses
// it.
type vring struct {
	num     uint32
	addr    vringAddr
	hasAddr bool
	base    uint16   // index of the next chain, while no queue runs
	kept    []uint16 // heads of chains that a paused device will take up again
	enabled bool
	record  *inflight // of chains without an answer; may be nil
	// What the descriptors mean: the driver's kicks, calls to the driver, errors.
	kick, call, errFD *os.File

	queue *Queue        // running, or nil
	done  chan struct{} // closed when Serve returned
	told  bool          // the device saw Serve since it was last told Stopped
}

func (r *vring) ready() bool {
	return r.queue == nil && r.enabled && r.hasAddr && r.kick != nil && r.num > 0
}

// start runs the device on ring i if all of it is set.
func (s *session) start(i int) error {
	r := &s.rings[i]
	if !r.ready() {
		return nil
	}
	rg, err := newRing(&s.mem, r.num, r.addr)
	if err != nil {
		return fmt.Errorf("start queue %d: %w", i, err)
	}
	if err := r.kick.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("start queue %d: %w", i, err)
	}
	if err := s.takeUp(r, &rg); err != nil {
		return fmt.Errorf("start queue %d: %w", i, err)
	}
	q := &Queue{ring: rg, mem: &s.mem, eventIdx: s.features&featureEventIdx != 0, kick: r.kick, call: r.call,
		errFD: r.errFD, breaker: &s.breaker, halted: make(chan struct{}), lastAvail: r.base, kept: r.kept,
		record: r.record, usedIdx: rg.usedIdx()}
	if err := s.breaker.add(q); err != nil {
		return nil // reported when it broke; the driver's next start mends it
	}
	r.queue, r.done, r.told = q, make(chan struct{}), true
	go func() {
		defer close(r.done)
		s.cfg.Device.Serve(i, q)
	}()
	return nil
}

// takeUp goes on where a process before this one has ended, if there was one.
func (s *session) takeUp(r *vring, rg *ring) error {
	if r.record == nil || r.told {
		return nil
	}
	if r.num > uint32(s.recordSize) {
		return fmt.Errorf("%w: ring of %d descriptors, the record has room for %d", ErrProtocol, r.num, s.recordSize)
	}
	used := rg.usedIdx()
	heads, resumed := r.record.resume(rg.num, used)
	if !resumed {
		return nil
	}
	r.kept, r.base = heads, used+uint16(len(heads))
	signal(r.call) // the one of the last answer may be missing
	return nil
}

// pause takes ring i from the device; the device keeps its state.
func (s *session) pause(i int) { s.halt(i, false) }

// drain is pause with all chains answered.
func (s *session) drain(i int) { s.halt(i, true) }

func (s *session) halt(i int, drain bool) {
	r := &s.rings[i]
	if r.queue == nil {
		return
	}
	r.queue.halt(drain)
	<-r.done
	r.queue.taken.Wait()
	r.base, r.kept = r.queue.lastAvail, r.queue.kept // nobody pops any more
	s.breaker.remove(r.queue)
	r.queue = nil
}

// stop takes ring i from the device for good.
func (s *session) stop(i int) {
	s.pause(i)
	r := &s.rings[i]
	r.kept = nil
	if r.told {
		r.told = false
		s.cfg.Device.Stopped(i)
	}
	for j := range s.rings {
		if s.rings[j].told {
			return
		}
	}
	s.breaker.mend()
}

// reset stops all rings, as a driver's device reset does.
func (s *session) reset() {
	for i := range s.rings {
		s.stop(i)
		s.rings[i].enabled = false
	}
}

// whilePaused runs change with no queue running.
func (s *session) whilePaused(change func() error) error {
	for i := range s.rings {
		s.pause(i)
	}
	err := change()
	for i := range s.rings {
		err = errors.Join(err, s.start(i))
	}
	return err
}

// replaceKick changes ring i's kick descriptor; the ring may run.
func (s *session) replaceKick(i int, f *os.File) error {
	s.pause(i)
	r := &s.rings[i]
	closeFile(r.kick)
	r.kick = f
	return s.start(i)
}

func (s *session) replaceCall(i int, f *os.File) {
	r := &s.rings[i]
	if r.queue != nil {
		r.queue.setCall(f)
	}
	closeFile(r.call)
	r.call = f
}

func (s *session) replaceErr(i int, f *os.File) {
	r := &s.rings[i]
	if r.queue != nil {
		r.queue.setErr(f)
	}
	closeFile(r.errFD)
	r.errFD = f
}

// newEvent wraps an eventfd of the front-end for Go's poller and owns fd.
func newEvent(fd int) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	// A file that cannot be polled could not be woken in Wait.
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: ring descriptor cannot be polled: %w", ErrProtocol, err), f.Close())
	}
	return f, nil
}

func closeFile(f *os.File) {
	if f != nil {
		_ = f.Close() // an eventfd has nothing to lose
	}
}
