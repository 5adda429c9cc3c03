package vhostvsock

import (
	"errors"
	"sync"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
)

var (
	errStopped = errors.New("the guest's driver is not running")
	errAborted = errors.New("connection aborted")
)

// rxQueue is the device's end of the queue to the guest.
//
//	stopped → running   Serve begins
//	running → paused    Serve returns; senders wait
//	paused  → running   Serve begins again
//	any     → stopped   the driver is gone; senders fail
type rxQueue struct {
	// turn holds one token while somebody sends. A channel hands it over in the
	// order of arrival, a mutex would not.
	turn chan struct{}
	// kicked says that the guest may have offered buffers.
	kicked chan struct{}

	mu      sync.Mutex
	state   rxState
	queue   *vhostuser.Queue // while running
	changed chan struct{}    // closed when state changes
}

type rxState int

const (
	rxStopped rxState = iota
	rxRunning
	rxPaused
)

func newRXQueue() *rxQueue {
	return &rxQueue{turn: make(chan struct{}, 1), kicked: make(chan struct{}, 1), changed: make(chan struct{})}
}

func (r *rxQueue) set(state rxState, q *vhostuser.Queue) {
	r.mu.Lock()
	r.state, r.queue = state, q
	close(r.changed)
	r.changed = make(chan struct{})
	r.mu.Unlock()
}

// pause is for the end of Serve; a broken device was stopped already.
func (r *rxQueue) pause() {
	if state, _, _ := r.get(); state == rxRunning {
		r.set(rxPaused, nil)
	}
}

func (r *rxQueue) get() (rxState, *vhostuser.Queue, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state, r.queue, r.changed
}

func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // it is set already
	}
}

// acquire waits for the turn, until done is closed.
func (r *rxQueue) acquire(done <-chan struct{}) error {
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-done:
		return errAborted
	}
}

func (r *rxQueue) release() { <-r.turn }

// pop takes a buffer of at least size bytes into c, waiting for the guest until
// done is closed. Precondition: the caller has the turn and holds no other buffer.
func (r *rxQueue) pop(c *vhostuser.Chain, size int64, done <-chan struct{}) (*vhostuser.Queue, error) {
	for {
		state, q, changed := r.get()
		if state == rxStopped {
			return nil, errStopped
		}
		if state == rxRunning {
			ok, err := popLarge(q, c, size)
			if ok || err != nil {
				return q, err
			}
		}
		select {
		case <-r.kicked:
		case <-changed:
		case <-done:
			return nil, errAborted
		}
	}
}

// popLarge takes a buffer of at least size bytes; smaller ones go back empty.
func popLarge(q *vhostuser.Queue, c *vhostuser.Chain, size int64) (bool, error) {
	for {
		ok, err := q.Pop(c)
		if !ok || err != nil || vhostuser.Len(c.Writable) >= size {
			return ok, err
		}
		q.Push(c, 0)
	}
}

// send puts one packet without payload into a buffer. fill completes the header
// when the buffer is there, in the order of the queue.
func (r *rxQueue) send(done <-chan struct{}, fill func() header) error {
	if err := r.acquire(done); err != nil {
		return err
	}
	defer r.release()
	var c vhostuser.Chain
	q, err := r.pop(&c, headerLen, done)
	if err != nil {
		return err
	}
	h := fill()
	putHeader(c.Writable, &h)
	q.Push(&c, headerLen)
	q.Notify()
	return nil
}
