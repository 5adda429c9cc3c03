package vhostvsock

import (
	"errors"
	"sync"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"golang.org/x/sys/unix"
)

const (
	// batchBytes bounds what a connection sends in one turn.
	batchBytes = 64 << 10
	// batchBuffers bounds the buffers for that; Linux guests offer 4 KiB each.
	batchBuffers = 16
	// maxPacket is VIRTIO_VSOCK_MAX_PKT_BUF_SIZE of Linux, bytes.
	maxPacket = 64 << 10
	// keepBytes is the buffer that a connection keeps after its host peer was slow.
	keepBytes = 32 << 10
)

// pump moves bytes both ways until both directions have ended.
func (c *conn) pump() {
	c.mu.Lock()
	c.open = true
	c.mu.Unlock()
	notify(c.data) // what came before the host peer was ready
	var wg sync.WaitGroup
	wg.Go(c.toHost)
	c.toGuest()
	wg.Wait()
}

// toHost writes what the host peer did not take at once, and the guest's end.
func (c *conn) toHost() {
	var spare []byte
	for {
		select {
		case <-c.data:
		case <-c.done:
			return
		}
		b, eof := c.takePending(spare)
		if len(b) > 0 {
			_, err := c.sock.Write(b)
			c.wrote(len(b), err)
			if spare = b[:0]; cap(b) > keepBytes {
				spare = nil
			}
		}
		if eof {
			_ = c.sock.CloseWrite() // a peer that is gone needs no end
			c.endIfDone()
			return
		}
	}
}

// takePending gives all that waits to toHost; eof when nothing can follow it.
func (c *conn) takePending(spare []byte) (b []byte, eof bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, c.pending = c.pending, spare
	c.writing = len(b)
	return b, c.guestEOF
}

func (c *conn) wrote(n int, err error) {
	c.mu.Lock()
	c.writing = 0
	c.forwarded += uint32(n)
	deaf := err != nil && !c.hostDeaf
	c.hostDeaf = c.hostDeaf || deaf
	if c.hostDeaf {
		c.pending = nil
	}
	c.mu.Unlock()
	c.oweCredit()
	if deaf {
		// What the peer sent before it left must still reach the guest, so this is
		// not the end: toGuest finds that. An error is the guest's end.
		_ = c.send(opShutdown, shutReceive)
	}
}

// endIfDone wakes toGuest when it only waits for the host peer to leave and the
// guest will neither send nor hear more.
func (c *conn) endIfDone() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hostEOF {
		_ = c.sock.SetReadDeadline(past())
	}
}

// toGuest sends what the host peer writes, and its end.
func (c *conn) toGuest() {
	t := &transfer{conn: c}
	for c.waitRoom() {
		if err := c.raw.Read(t.step); err != nil || t.err != nil {
			break
		}
		if t.eof {
			c.hostEnded()
			return
		}
	}
	// The guest is deaf, or gone; the host peer shall not write into the void.
	_ = c.sock.CloseRead() // a closed socket is as good
}

// waitRoom waits for credit; false when there is nothing to send any more.
func (c *conn) waitRoom() bool {
	for {
		n, deaf := c.room()
		if deaf {
			return false
		}
		if n > 0 {
			return true
		}
		select {
		case <-c.credit:
		case <-c.done:
			return false
		}
	}
}

// hostEnded passes the host peer's end on, then waits until the peer has left
// altogether, or the guest has ended its direction too.
func (c *conn) hostEnded() {
	c.mu.Lock()
	c.hostEOF = true
	both := c.guestEOF && len(c.pending) == 0 && c.writing == 0
	c.mu.Unlock()
	if both || c.send(opShutdown, shutSend) != nil {
		return
	}
	// The deadline of endIfDone, shutdown or abort ends this with an error.
	if c.raw.Read(func(fd uintptr) bool { return hungUp(int(fd)) }) == nil {
		c.abort(errHungUp)
	}
}

// hungUp tells whether a unix socket's peer has closed it: half closed, it is
// readable without POLLHUP.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
}

// transfer is the state of toGuest; one goroutine uses it.
type transfer struct {
	conn   *conn
	eof    bool
	err    error
	chains [batchBuffers]vhostuser.Chain
	rooms  [batchBuffers]int // payload bytes of each chain
	iov    [][]byte
}

// step moves one batch from the socket into buffers of the guest. False means that
// there is nothing to read now.
func (t *transfer) step(fd uintptr) bool {
	c := t.conn
	room, deaf := c.room()
	if deaf || room == 0 {
		return true
	}
	if t.err = c.dev.rx.acquire(c.done); t.err != nil {
		return true
	}
	defer c.dev.rx.release()
	q, n, err := t.take(int(min(room, batchBytes)))
	if err != nil {
		t.err = err
		return true
	}
	read, err := unix.Readv(int(fd), t.iov)
	if read > 0 {
		t.push(q, n, read)
		return true
	}
	q.Unpop(n)
	if errors.Is(err, unix.EAGAIN) {
		return false
	}
	t.eof = !errors.Is(err, unix.EINTR) // any other error is the peer's end, too
	return true
}

// take pops buffers for limit bytes, waiting for the first one. Precondition: the
// caller has the turn.
func (t *transfer) take(limit int) (q *vhostuser.Queue, n int, err error) {
	t.iov = t.iov[:0]
	q, err = t.conn.dev.rx.pop(&t.chains[0], headerLen+1, t.conn.done)
	if err != nil {
		return nil, 0, err
	}
	for ok := true; ok; {
		t.iov, t.rooms[n] = behindHeader(t.iov, t.chains[n].Writable, min(limit, maxPacket))
		limit -= t.rooms[n]
		if n++; limit == 0 || n == batchBuffers {
			break
		}
		if ok, err = q.Pop(&t.chains[n]); err != nil {
			q.Unpop(n) // the queue is broken; only the count matters
			return nil, 0, err
		}
		// A small one waits for the next turn: Unpop works from the end only.
		if ok && vhostuser.Len(t.chains[n].Writable) <= headerLen {
			q.Unpop(1)
			ok = false
		}
	}
	return q, n, nil
}

// push sends the first bytes of n buffers, which were filled one after another.
func (t *transfer) push(q *vhostuser.Queue, n, bytes int) {
	c := t.conn
	c.mu.Lock()
	c.sent += uint32(bytes)
	c.mu.Unlock()
	h := c.header(opData)
	used := 0
	for ; bytes > 0; used++ {
		k := min(bytes, t.rooms[used])
		bytes -= k
		h.len = uint32(k)
		putHeader(t.chains[used].Writable, &h)
		q.Push(&t.chains[used], headerLen+k)
	}
	if used < n {
		q.Unpop(n - used)
	}
	q.Notify()
}
