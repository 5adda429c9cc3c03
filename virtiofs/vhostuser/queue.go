package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Queue is a running virtqueue. All of its methods may be called by several
// goroutines; the device's Serve is told of the end by Wait.
type Queue struct {
	ring     ring
	mem      *memory
	eventIdx bool
	kick     *os.File
	breaker  *breaker
	halted   chan struct{} // closed by halt

	mu        sync.Mutex
	stopped   bool
	draining  bool
	lastAvail uint16    // index of the next chain to take
	out       int       // chains popped and not given back, at most ring.num
	kept      []uint16  // heads that Pop gives out before new ones, or the next start does
	record    *inflight // of the chains that are out or kept; may be nil
	usedIdx   uint16    // index of the next used element
	signaled  uint16    // usedIdx at the last call, when hasSignaled
	// Without a call yet (or after a pause) the driver's wish cannot be compared.
	hasSignaled bool

	callMu sync.Mutex
	call   *os.File // may be nil: the driver polls
	errFD  *os.File // may be nil

	taken sync.WaitGroup // chains popped and not pushed
}

// Wait returns true when the driver has kicked since the last call, and false when
// the device must let go of the queue: give back what it holds, then return from
// Serve.
func (q *Queue) Wait() bool {
	if q.isStopped() {
		return false
	}
	var b [8]byte
	_, err := q.kick.Read(b[:])
	if q.isStopped() {
		return false
	}
	if err != nil {
		q.breaker.fail(fmt.Errorf("wait for a kick: %w", err))
	}
	return err == nil
}

func (q *Queue) isStopped() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.stopped
}

// halt makes Wait and Pop give up; it does not wait for anybody. drain is what
// Draining tells.
func (q *Queue) halt(drain bool) {
	q.mu.Lock()
	if !q.stopped {
		q.stopped, q.draining = true, drain
		close(q.halted)
	}
	q.mu.Unlock()
	_ = q.kick.SetReadDeadline(time.Unix(1, 0)) // wakes Wait; newEvent saw that it works
}

// Halted is closed when the device must let go of the queue, for those who cannot
// wait in Wait.
func (q *Queue) Halted() <-chan struct{} { return q.halted }

// Draining says how to let go of a halted queue. True: the driver may never be
// served again but wants its answers (the machine is paused, or powered off), so
// all chains shall be answered in short time, if with an error. False: Keep what
// is not done yet; after a pause it is taken up again, otherwise nobody waits.
func (q *Queue) Draining() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.draining
}

// Pop takes the next chain of the driver into c, whose slices it reuses. False
// means that there is none now: a kick will follow the next one, see Wait. An
// error means that the driver broke the ring; the device is out of order until
// the driver starts it again, and nothing is left to do but to return from Serve.
// Each chain that was taken must be given to Push, Keep or Unpop.
func (q *Queue) Pop(c *Chain) (bool, error) {
	ok, err := q.pop(c)
	if err != nil {
		q.breaker.fail(err)
	}
	return ok, err
}

func (q *Queue) pop(c *Chain) (bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.stopped {
		return false, nil
	}
	if n := len(q.kept); n > 0 {
		head := q.kept[0]
		q.kept = q.kept[1:]
		return q.take(c, head)
	}
	ahead, err := q.available()
	if ahead == 0 || err != nil {
		return false, err
	}
	return q.takeNew(c, q.ring.availHead(q.lastAvail))
}

// takeNew takes a chain that the driver has just offered. Precondition: mu is held.
func (q *Queue) takeNew(c *Chain, head uint16) (bool, error) {
	if q.record != nil && head < q.ring.num && q.record.taken(head) {
		return false, fmt.Errorf("%w: chain %d is offered again before its answer", errRing, head)
	}
	ok, err := q.take(c, head)
	if ok {
		q.lastAvail++
		if q.record != nil {
			q.record.take(head)
		}
	}
	return ok, err
}

// take fills c with the chain at head. Precondition: mu is held.
func (q *Queue) take(c *Chain, head uint16) (bool, error) {
	// A chain has a descriptor at least, so more of them are in use than there are.
	if q.out == int(q.ring.num) {
		return false, fmt.Errorf("%w: more than %d chains without an answer", errRing, q.out)
	}
	if err := c.walk(q.mem, q.ring.desc, head); err != nil {
		return false, err
	}
	q.out++
	q.taken.Add(1)
	return true, nil
}

// available is the number of chains to take; when it is 0, a kick was asked for.
func (q *Queue) available() (uint16, error) {
	n := q.ring.availIdx() - q.lastAvail
	if n == 0 && q.eventIdx {
		// Ask first, then look again, or a chain in between would go unseen.
		q.ring.setAvailEvent(q.lastAvail)
		n = q.ring.availIdx() - q.lastAvail
	}
	if n > q.ring.num {
		return 0, fmt.Errorf("%w: available index is %d ahead in a ring of %d", errRing, n, q.ring.num)
	}
	return n, nil
}

// Unpop gives the last n chains back as if they had never been taken.
// Precondition: nobody else took one since, and the device never uses Keep, nor a
// record of its chains.
func (q *Queue) Unpop(n int) {
	q.mu.Lock()
	q.lastAvail -= uint16(n)
	q.out -= n
	q.mu.Unlock()
	q.taken.Add(-n)
}

// Keep gives c back without an answer, in any order. After a pause it is popped
// again, walked anew: the memory may have moved. A queue that is stopped, not
// paused, forgets it.
func (q *Queue) Keep(c *Chain) {
	q.mu.Lock()
	q.kept = append(q.kept, c.head)
	q.out--
	q.mu.Unlock()
	q.taken.Done()
}

// Push hands c back to the driver; n bytes of Writable were written. Notify tells
// the driver, once for any number of chains.
func (q *Queue) Push(c *Chain, n int) {
	q.mu.Lock()
	q.ring.setUsed(q.usedIdx, c.head, uint32(n))
	if q.record != nil {
		q.record.answering(c.head, q.usedIdx)
	}
	q.usedIdx++
	q.ring.setUsedIdx(q.usedIdx)
	if q.record != nil {
		q.record.answered(c.head, q.usedIdx)
	}
	q.out--
	q.mu.Unlock()
	q.taken.Done()
}

// Notify interrupts the driver if it wants that.
func (q *Queue) Notify() {
	if q.wanted() {
		q.callMu.Lock()
		signal(q.call)
		q.callMu.Unlock()
	}
}

func (q *Queue) wanted() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.eventIdx {
		return q.ring.availFlags()&availNoInterrupt == 0
	}
	// Section 2.7.7.2: the index that the driver waits for was passed.
	event := q.ring.usedEvent()
	want := !q.hasSignaled || q.usedIdx-event-1 < q.usedIdx-q.signaled
	q.signaled, q.hasSignaled = q.usedIdx, true
	return want
}

func (q *Queue) setCall(f *os.File) {
	q.callMu.Lock()
	q.call = f
	q.callMu.Unlock()
}

func (q *Queue) setErr(f *os.File) {
	q.callMu.Lock()
	q.errFD = f
	q.callMu.Unlock()
}

func (q *Queue) signalErr() {
	q.callMu.Lock()
	signal(q.errFD)
	q.callMu.Unlock()
}

// signal adds one to an eventfd. It fails when the counter is full, which is as
// good as one more, or when the front-end passed nonsense, which is its loss.
func signal(f *os.File) {
	if f != nil {
		one := [8]byte{1}
		_, _ = f.Write(one[:])
	}
}

// breaker holds a device's queues together: what breaks one breaks all.
// Lock order: breaker.mu, Queue.mu.
type breaker struct {
	report func(error)

	mu      sync.Mutex
	err     error
	running map[*Queue]bool
}

var errBroken = errors.New("the device is broken until its driver starts it again")

func (b *breaker) add(q *Queue) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return errBroken
	}
	if b.running == nil {
		b.running = map[*Queue]bool{}
	}
	b.running[q] = true
	return nil
}

func (b *breaker) remove(q *Queue) {
	b.mu.Lock()
	delete(b.running, q)
	b.mu.Unlock()
}

// mend makes a broken device usable again. Precondition: no queue runs.
func (b *breaker) mend() {
	b.mu.Lock()
	b.err = nil
	b.mu.Unlock()
}

func (b *breaker) fail(err error) {
	b.mu.Lock()
	first := b.err == nil
	if first {
		b.err = err
		for q := range b.running {
			q.halt(false)
			q.signalErr()
		}
	}
	b.mu.Unlock()
	if first {
		b.report(err)
	}
}
