package vhostvsock

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"golang.org/x/sys/unix"
)

// conn is one stream. Its life: newConn, registered in the device, attach, pump,
// finish.
type conn struct {
	dev      *Device
	key      key
	fromHost bool // the node opened it; immutable once registered

	sock *net.UnixConn   // to the host peer; set by attach
	raw  syscall.RawConn // of sock

	answered chan struct{} // closed by the guest's response
	done     chan struct{} // closed by abort
	credit   chan struct{} // the guest gave credit, or is deaf
	data     chan struct{} // pending or guestEOF changed

	mu       sync.Mutex
	err      error // why done is closed
	response bool  // answered is closed

	// To the guest: its buffer, what it consumed of it, what was sent.
	peerAlloc, peerFwd, sent uint32
	guestDeaf                bool // the guest receives no more

	// From the guest.
	pending   []byte // waits for the host peer
	writing   int    // bytes that toHost is writing now
	forwarded uint32 // bytes that left for the host peer
	told      uint32 // of which the guest knows
	owes      bool   // the reply goroutine is to send credit
	open      bool   // the host peer may get bytes
	guestEOF  bool   // the guest sends no more
	hostDeaf  bool   // the host peer receives no more
	hostEOF   bool   // the host peer sends no more
}

// past is a deadline that wakes whoever reads or writes.
func past() time.Time { return time.Unix(1, 0) }

func newConn(d *Device, k key) *conn {
	return &conn{dev: d, key: k, answered: make(chan struct{}), done: make(chan struct{}),
		credit: make(chan struct{}, 1), data: make(chan struct{}, 1)}
}

// attach gives the connection its host peer, which finish will close.
func (c *conn) attach(sock *net.UnixConn) error {
	raw, err := sock.SyscallConn()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sock, c.raw = sock, raw
	return errors.Join(c.err, err)
}

// abort ends the connection at once; whoever waits for it wakes up.
func (c *conn) abort(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.done)
	if c.sock != nil {
		_ = c.sock.SetDeadline(past()) // wakes the pumps
	}
}

func (c *conn) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

var (
	errReset  = errors.New("reset by the guest") // its own end of a connection
	errHungUp = errors.New("the host peer has left")
)

// receive handles a packet of the guest. It must not wait.
func (c *conn) receive(h *header, payload [][]byte) {
	c.setCredit(h)
	switch h.op {
	case opData:
		c.deliver(payload, int(h.len))
	case opCreditUpdate:
	case opCreditRequest:
		c.mu.Lock()
		c.told = c.forwarded - uint32(c.dev.cfg.Buffer) // makes an update due
		c.mu.Unlock()
		c.oweCredit()
	case opResponse:
		c.respond()
	case opShutdown:
		c.shutdown(h.flags)
	case opReset:
		c.dev.forget(c)
		c.abort(errReset)
	default: // opRequest for ports in use, unknown operations
		c.dev.reset(c.key, c, h.op)
	}
}

func (c *conn) setCredit(h *header) {
	c.mu.Lock()
	c.peerAlloc, c.peerFwd = h.bufAlloc, h.fwdCnt
	c.mu.Unlock()
	notify(c.credit)
}

func (c *conn) respond() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fromHost && !c.response {
		c.response = true
		close(c.answered)
	}
}

// room is what the guest can take, in bytes.
func (c *conn) room() (n uint32, deaf bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	inFlight := c.sent - c.peerFwd
	if inFlight >= c.peerAlloc {
		return 0, c.guestDeaf
	}
	return c.peerAlloc - inFlight, c.guestDeaf
}

// deliver brings n bytes of the guest to the host peer, or keeps them for toHost
// when the peer is slow.
func (c *conn) deliver(payload [][]byte, n int) {
	c.mu.Lock()
	over := c.err == nil && (c.guestEOF || int64(len(c.pending)+c.writing+n) > c.dev.cfg.Buffer)
	if !over && c.err == nil && !c.hostDeaf {
		payload = cut(payload, n)
		sent := 0
		if c.open && c.writing == 0 && len(c.pending) == 0 {
			sent = c.trySend(payload)
			c.forwarded += uint32(sent)
		}
		if sent < n {
			_, payload = skip(payload, sent)
			for _, b := range payload {
				c.pending = append(c.pending, b...)
			}
			notify(c.data)
		}
	}
	c.mu.Unlock()
	if over {
		c.dev.reset(c.key, c, opData) // more than its credit, or after its end
		return
	}
	c.oweCredit()
}

// trySend sends what the socket takes at once. Errors are left to toHost.
// Precondition: c.mu is held.
func (c *conn) trySend(bufs [][]byte) int {
	sent := 0
	err := c.raw.Write(func(fd uintptr) bool {
		n, err := unix.SendmsgBuffers(int(fd), bufs, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if err == nil {
			sent = n
		}
		return true
	})
	if err != nil {
		return 0 // aborted: nobody will look at it
	}
	return sent
}

// cut shortens bufs to n bytes. It moves the slices of bufs.
func cut(bufs [][]byte, n int) [][]byte {
	for i, b := range bufs {
		if len(b) >= n {
			bufs[i] = b[:n]
			return bufs[:i+1]
		}
		n -= len(b)
	}
	return bufs
}

// skip drops n bytes from the beginning of bufs. It moves the slices of bufs.
func skip(bufs [][]byte, n int) (int, [][]byte) {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n > 0 && len(bufs) > 0 {
		bufs[0] = bufs[0][n:]
	}
	return n, bufs
}

// oweCredit has the guest told of consumed bytes once they are worth a packet.
func (c *conn) oweCredit() {
	c.mu.Lock()
	owe := !c.owes && c.creditDue()
	c.owes = c.owes || owe
	c.mu.Unlock()
	if owe {
		c.dev.owe(c)
	}
}

// creditDue: packets with data carry the credit as well, so that often none is.
func (c *conn) creditDue() bool {
	return c.err == nil && !c.guestEOF && int64(c.forwarded-c.told) >= c.dev.cfg.Buffer/4
}

// sendCredit sends the credit if it is still due; paid must follow.
func (c *conn) sendCredit(stop <-chan struct{}) error {
	c.mu.Lock()
	due := c.creditDue()
	c.mu.Unlock()
	if !due {
		return nil
	}
	return c.dev.rx.send(stop, func() header { return c.header(opCreditUpdate) })
}

func (c *conn) paid() {
	c.mu.Lock()
	c.owes = false
	c.mu.Unlock()
	c.oweCredit() // bytes may have left in the meantime
}

// shutdown ends one or both directions for the guest.
func (c *conn) shutdown(flags uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if flags&shutSend != 0 {
		c.guestEOF = true
		notify(c.data)
	}
	if flags&shutReceive != 0 && !c.guestDeaf {
		c.guestDeaf = true
		notify(c.credit)
		if c.sock != nil {
			_ = c.sock.SetReadDeadline(past()) // ends toGuest
		}
	}
}

// header is a packet's head with the credit of this moment; it must be called in
// the order of the queue, lest the guest sees its credit shrink.
func (c *conn) header(o op) header {
	h := c.dev.header(c.key, o)
	h.bufAlloc = uint32(c.dev.cfg.Buffer)
	c.mu.Lock()
	h.fwdCnt, c.told = c.forwarded, c.forwarded
	c.mu.Unlock()
	return h
}

func (c *conn) send(o op, flags uint32) error {
	return c.dev.rx.send(c.done, func() header {
		h := c.header(o)
		h.flags = flags
		return h
	})
}

// finish tells the guest the end unless the end came from there, and gives the
// ports and the socket back.
func (c *conn) finish() {
	err := c.failure()
	if !errors.Is(err, errReset) && !errors.Is(err, errStopped) {
		// The ports become free when the guest can see the reset and not before,
		// or a new connection with the same ports would get it.
		_ = c.dev.rx.send(c.dev.ctx.Done(), func() header {
			c.dev.forget(c)
			return c.dev.header(c.key, opReset)
		}) // an error is the guest's end
	}
	c.dev.forget(c)
	c.abort(errAborted)
	if c.sock != nil {
		_ = c.sock.Close() // both directions ended before
	}
}

var _ vhostuser.Device = (*Device)(nil)
