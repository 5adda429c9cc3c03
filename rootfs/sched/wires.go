package sched

import (
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// wires are the connections of the answers under way, and what the kernel received for
// them. The zero value has none.
type wires struct {
	mu       sync.Mutex
	open     map[net.Conn]*wire
	uses     int   // answers whose connection is known
	received int64 // for all of them, while they were known
	passive  bool  // leaves the receive windows alone
}

type wire struct {
	raw     syscall.RawConn
	uses    int
	state   state // at the latest look
	keepsUp int   // looks in a row at which its reader was not behind
	window  int   // bytes that the host may send at once; 0: as the kernel sees fit
	buffer  int   // bytes under way and unread
}

const (
	// leastWindow is the least receive window that a connection gets.
	leastWindow = 32 << 10
	// mostWindow is the largest that TCP has (RFC 7323, section 2.3). A socket option
	// is an int of 32 bits.
	mostWindow = 1 << 30
	// The windows of connections whose readers are behind are together pathWindows
	// times what fits into the path to the host, and what comes while a reader is late.
	pathWindows = 2
	readerLate  = 2 * time.Millisecond
	// Those whose readers keep up may have what fits into a path with a queue.
	queueTime = 20 * time.Millisecond
	// keptUp looks at which its reader is not behind tell that it keeps up.
	keptUp = 3
	// allowedReceive is what the kernel's default net.core.rmem_max lets everybody have.
	allowedReceive = 208 << 10
)

// use counts an answer over c until done.
func (ws *wires) use(c net.Conn) (done func()) {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn() // below TLS
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return func() {}
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return func() {}
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	w := ws.open[c]
	if w == nil {
		if ws.open == nil {
			ws.open = map[net.Conn]*wire{}
		}
		w = &wire{raw: raw}
		w.look()
		ws.open[c] = w
	}
	w.uses++
	ws.uses++
	return sync.OnceFunc(func() { ws.drop(c, w) })
}

func (ws *wires) drop(c net.Conn, w *wire) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.uses--
	if w.uses--; w.uses == 0 {
		ws.count(w)
		delete(ws.open, c)
	}
}

// state is what the kernel knows about a connection.
type state struct {
	received, unread int64 // bytes that came in order so far; of those, unread
	promised         int64 // bytes that the host may send at once: the receive window
	rtt              time.Duration
	segment          int // bytes
}

// count adds what came for w since the latest look.
func (ws *wires) count(w *wire) {
	before := w.state.received
	w.look()
	if w.state.received > before {
		ws.received += w.state.received - before
	}
	w.keepsUp++
	if w.state.behind() {
		w.keepsUp = 0
	}
}

// look asks the kernel; nothing changes when the connection is closed.
func (w *wire) look() {
	s := &w.state
	_ = w.raw.Control(func(fd uintptr) {
		// include/uapi/linux/tcp.h: tcpi_bytes_received since Linux 4.1, tcpi_rcv_wnd
		// since 6.2; what a kernel does not know stays 0.
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			s.received, s.promised, s.segment = int64(info.Bytes_received), int64(info.Rcv_wnd), int(info.Rcv_mss)
			s.rtt = time.Duration(info.Min_rtt) * time.Microsecond
		}
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ); err == nil {
			s.unread = int64(n)
		}
	})
}

// behind says whether the reader of a connection is what limits it.
func (s state) behind() bool { return s.unread >= leastWindow/4 && s.unread >= s.promised/4 }

// sample is what came so far, known when the connections of as many answers are as there
// are readers. It bounds the receive windows for a host that sends capacity bytes a
// second; 0: not known.
func (ws *wires) sample(readers int, capacity float64) wireSample {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	sample := wireSample{known: ws.uses > 0 && ws.uses >= readers}
	upToDate := 0
	for _, w := range ws.open {
		ws.count(w)
		sample.unread += w.state.unread
		if w.keepsUp >= keptUp {
			upToDate++
		}
	}
	sample.received = ws.received
	if capacity > 0 && !ws.passive {
		for _, w := range ws.open {
			w.bound(w.best(capacity, len(ws.open), upToDate))
		}
	}
	return sample
}

// best is the receive window for one of n connections, of which the readers of some have
// kept up with what comes for a while. What has been promised to a host comes also after
// a class has been told to take less, and queues in the network; the kernel alone lets it
// grow to megabytes for each connection.
func (w *wire) best(capacity float64, n, upToDate int) int {
	late := readerLate
	switch {
	case w.keepsUp >= keptUp:
		late, n = queueTime, upToDate
	case w.window == 0:
		late = queueTime
	case w.keepsUp > 0:
		return w.window
	}
	fits := int(min(pathWindows*capacity*(w.state.rtt+late).Seconds(), mostWindow*float64(n)))
	window := max(fits/n, leastWindow, 4*w.state.segment)
	if w.window > 0 {
		window = min(window, 2*w.window)
	}
	return window
}

// bound sets the receive window of a connection, and its receive buffer. TCP_WINDOW_CLAMP
// alone does not bound what is unread; a buffer below what has been promised would make
// the kernel drop what comes.
func (w *wire) bound(window int) {
	buffer := window
	if held := int(w.state.unread + w.state.promised); held > window {
		buffer = held
		if w.buffer > 0 {
			buffer = max(window, min(held, w.buffer))
		}
	}
	if near(window, w.window) && near(buffer, w.buffer) {
		return
	}
	_ = w.raw.Control(func(fd uintptr) {
		err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer)
		if err != nil && buffer <= allowedReceive { // without CAP_NET_ADMIN
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, buffer)
		}
		if err == nil && unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP, window) == nil {
			w.window, w.buffer = window, buffer
		}
	})
}

// near says whether a is so near to b that a change is not worth a system call.
func near(a, b int) bool { return a > b-b/8 && a < b+b/8 }
