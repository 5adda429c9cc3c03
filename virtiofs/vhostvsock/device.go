package vhostvsock

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
)

const (
	queueRX   = 0 // to the guest
	queueTX   = 1 // from the guest
	numQueues = 3 // the event queue stays with QEMU

	defaultBuffer   = 256 << 10
	defaultMaxConns = 1024

	// maxResets bounds the answers to packets of no connection that wait for the
	// guest to offer buffers; a guest that causes more loses some.
	maxResets = 128
	// firstPort begins the ports of connections from the node. Ports below are
	// left to services.
	firstPort = 1 << 30
)

// Config describes a device.
type Config struct {
	CID  uint32 // the guest's, from 3
	Path string // of the unix socket for clients on the node
	// Buffer is the credit that the guest gets for each connection, bytes; what a
	// slow host peer can make the device keep. 256 KiB when 0.
	Buffer int64
	// MaxConns bounds the connections of the guest and those of the node, each;
	// 1024 when 0. More are reset.
	MaxConns int
	Log      *slog.Logger // nil for none
}

func (c *Config) complete() error {
	if c.Buffer == 0 {
		c.Buffer = defaultBuffer
	}
	if c.MaxConns == 0 {
		c.MaxConns = defaultMaxConns
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.CID <= vsock.HostCID || c.CID == 1<<32-1 || c.Path == "" || c.Buffer < 4096 || c.Buffer > 1<<30 || c.MaxConns < 0 {
		return fmt.Errorf("%w: vsock device with CID %d at %q, buffer of %d bytes, %d connections",
			errdefs.ErrInvalidArgument, c.CID, c.Path, c.Buffer, c.MaxConns)
	}
	return nil
}

// key names a connection.
type key struct{ hostPort, guestPort uint32 }

// Device is the vhostuser.Device.
type Device struct {
	cfg Config
	rx  *rxQueue
	// ctx ends with the device; the connections' dials and handshakes use it.
	ctx context.Context
	wg  sync.WaitGroup // connections' goroutines

	mu       sync.Mutex
	conns    map[key]*conn
	fromHost int    // how many of conns the node opened
	nextPort uint32 // for a connection from the node
	// Work for the reply goroutine: connections that owe the guest their credit,
	// packets to be answered with a reset.
	owing    []*conn
	resets   []key
	hasReply chan struct{}
}

func newDevice(ctx context.Context, cfg Config) *Device {
	return &Device{cfg: cfg, ctx: ctx, rx: newRXQueue(), conns: map[key]*conn{}, nextPort: firstPort,
		hasReply: make(chan struct{}, 1)}
}

// space is the device's configuration: the guest's CID.
func (d *Device) space() []byte {
	return binary.LittleEndian.AppendUint64(nil, uint64(d.cfg.CID))
}

// Serve implements vhostuser.Device.
func (d *Device) Serve(i int, q *vhostuser.Queue) {
	switch i {
	case queueRX:
		d.serveRX(q)
	case queueTX:
		d.serveTX(q)
	default:
		for q.Wait() { // nothing to report
		}
	}
}

// Stopped implements vhostuser.Device: with the driver, its connections are gone.
func (d *Device) Stopped(i int) {
	if i != queueRX && i != queueTX {
		return
	}
	if i == queueRX {
		d.rx.set(rxStopped, nil)
	}
	d.mu.Lock()
	conns := d.conns
	d.conns, d.fromHost = map[key]*conn{}, 0
	d.owing, d.resets = nil, nil
	d.mu.Unlock()
	for _, c := range conns {
		c.abort(errStopped)
	}
}

// broken is told that the guest broke a ring: nothing can be sent or received
// until its driver starts again.
func (d *Device) broken(error) { d.Stopped(queueRX) }

func (d *Device) serveRX(q *vhostuser.Queue) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { d.reply(stop) })
	d.rx.set(rxRunning, q)
	for q.Wait() {
		notify(d.rx.kicked)
	}
	d.rx.pause()
	close(stop)
	wg.Wait()
}

func (d *Device) serveTX(q *vhostuser.Queue) {
	var c vhostuser.Chain
	for {
		ok, err := q.Pop(&c)
		if err != nil {
			return // the server has told the owner
		}
		if ok {
			d.receive(c.Readable)
			q.Push(&c, 0)
			continue
		}
		q.Notify()
		if !q.Wait() {
			return
		}
	}
}

// receive handles one packet of the guest. It must not wait for anything.
func (d *Device) receive(bufs [][]byte) {
	var b [headerLen]byte
	n, payload := vhostuser.CopyOut(b[:], bufs)
	h := parseHeader(&b)
	if n < headerLen || h.srcCID != uint64(d.cfg.CID) || h.dstCID != vsock.HostCID {
		d.cfg.Log.Debug("dropped a packet of the guest", "bytes", n, "src", h.srcCID, "dst", h.dstCID)
		return
	}
	k := key{hostPort: h.dstPort, guestPort: h.srcPort}
	d.mu.Lock()
	c := d.conns[k]
	d.mu.Unlock()
	switch {
	case h.typ != typeStream || int64(h.len) > vhostuser.Len(payload):
		d.reset(k, c, h.op)
	case c != nil:
		c.receive(&h, payload)
	case h.op == opRequest:
		d.open(k, &h)
	default:
		d.reset(k, nil, h.op)
	}
}

// open starts a connection that the guest asks for.
func (d *Device) open(k key, h *header) {
	c := newConn(d, k)
	c.setCredit(h)
	d.mu.Lock()
	room := len(d.conns)-d.fromHost < d.cfg.MaxConns && d.ctx.Err() == nil
	if room {
		d.conns[k] = c
		d.wg.Add(1)
	}
	d.mu.Unlock()
	if !room {
		d.reset(k, nil, h.op)
		return
	}
	go func() {
		defer d.wg.Done()
		c.serveGuest()
	}()
}

// register finds a port for a connection that the node asks for; nil when there
// are too many.
func (d *Device) register(guestPort uint32) *conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fromHost >= d.cfg.MaxConns || d.ctx.Err() != nil {
		return nil
	}
	for {
		k := key{hostPort: d.nextPort, guestPort: guestPort}
		if d.nextPort++; d.nextPort == 1<<32-1 { // VMADDR_PORT_ANY
			d.nextPort = firstPort
		}
		if d.conns[k] == nil {
			c := newConn(d, k)
			c.fromHost = true
			d.conns[k] = c
			d.fromHost++
			return c
		}
	}
}

// forget makes c's ports free.
func (d *Device) forget(c *conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conns[c.key] != c {
		return
	}
	delete(d.conns, c.key)
	if c.fromHost {
		d.fromHost--
	}
}

// Conns is the number of connections.
func (d *Device) Conns() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.conns)
}

// reset ends c, which may be nil, and answers a packet that cannot be right. A
// reset is not answered.
func (d *Device) reset(k key, c *conn, o op) {
	if c != nil {
		c.abort(fmt.Errorf("guest broke the protocol: %w", errAborted))
		return // the connection's goroutine sends the reset
	}
	if o == opReset {
		return
	}
	d.mu.Lock()
	if len(d.resets) < maxResets {
		d.resets = append(d.resets, k)
	}
	d.mu.Unlock()
	notify(d.hasReply)
}

// owe has c's credit sent soon.
func (d *Device) owe(c *conn) {
	d.mu.Lock()
	d.owing = append(d.owing, c)
	d.mu.Unlock()
	notify(d.hasReply)
}

// reply sends what the transmit queue must not wait for, until stop is closed.
func (d *Device) reply(stop <-chan struct{}) {
	for {
		select {
		case <-d.hasReply:
		case <-stop:
			notify(d.hasReply) // for the next one, after a pause
			return
		}
		for d.replyOne(stop) {
		}
	}
}

// replyOne sends the first reply that waits; false when there is none or stop is
// closed. What could not be sent waits for the next start.
func (d *Device) replyOne(stop <-chan struct{}) bool {
	d.mu.Lock()
	owing, resets := d.owing, d.resets
	d.mu.Unlock()
	switch {
	case len(owing) > 0:
		if owing[0].sendCredit(stop) != nil {
			return false
		}
		d.mu.Lock()
		d.owing = d.owing[min(1, len(d.owing)):] // Stopped may have emptied it
		d.mu.Unlock()
		owing[0].paid()
	case len(resets) > 0:
		if d.rx.send(stop, func() header { return d.header(resets[0], opReset) }) != nil {
			return false
		}
		d.mu.Lock()
		d.resets = d.resets[min(1, len(d.resets)):]
		d.mu.Unlock()
	default:
		return false
	}
	return true
}

func (d *Device) header(k key, o op) header {
	return header{srcCID: vsock.HostCID, dstCID: uint64(d.cfg.CID), srcPort: k.hostPort, dstPort: k.guestPort,
		typ: typeStream, op: o}
}
