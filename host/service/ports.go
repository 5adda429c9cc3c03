package service

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// backlog is how many connections of one sandbox wait to be accepted; more are
// closed, so that a sandbox that is slow to serve holds up no other.
const backlog = 16

// maxHeld bounds the connections that wait for their sandbox to be found.
const maxHeld = 64

// ports listens for sandboxes. An address on the file system belongs to one
// sandbox. A port of AF_VSOCK is shared by all virtual machines of the node:
// there the peer's context ID, which the kernel tells and a guest cannot
// forge, decides whose a connection is.
type ports struct {
	bind func(addr string) (net.Listener, error)
	peer func(net.Conn) (cid uint32, ok bool)
	// find looks for the sandbox of a cid that is not known and says whether
	// there is hope; nil when none is looked for. Immutable after the first
	// listen.
	find func(cid uint32) bool
	held chan struct{}  // one element for each connection that waits for find
	wg   sync.WaitGroup // shared ports being served, and held connections

	mu     sync.Mutex
	shared map[string]*port // by address; protected by mu
}

// port is one shared port.
type port struct {
	addr     string
	listener net.Listener
	routes   map[uint32]*route // protected by ports.mu
	kept     bool              // open also without routes; protected by ports.mu
}

func newPorts(bind func(string) (net.Listener, error), peer func(net.Conn) (uint32, bool)) *ports {
	return &ports{bind: bind, peer: peer, held: make(chan struct{}, maxHeld), shared: map[string]*port{}}
}

// keep opens a shared port that stays open without sandboxes.
func (p *ports) keep(addr string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	shared, err := p.open(addr)
	if err == nil {
		shared.kept = true
	}
	return err
}

// close closes the ports that are kept and returns when all shared ports are
// closed. Precondition: there are no routes.
func (p *ports) close() {
	p.mu.Lock()
	for _, shared := range p.shared {
		p.shut(shared)
	}
	p.mu.Unlock()
	p.wg.Wait()
}

// shut closes a port. Precondition: p.mu is held, and the port has no routes.
func (p *ports) shut(shared *port) {
	if p.shared[shared.addr] == shared {
		delete(p.shared, shared.addr)
	}
	_ = shared.listener.Close() // what is left of it is of no use
}

// listen returns a listener that accepts one sandbox.
func (p *ports) listen(addr string, cid uint32) (net.Listener, error) {
	a, err := vsock.ParseAddress(addr)
	if err != nil {
		return nil, err
	}
	if a.Network != vsock.VSock {
		return p.bind(addr)
	}
	if cid == 0 {
		return nil, fmt.Errorf("listen on %s: the port is shared, give the cid of the sandbox: %w", addr, errdefs.ErrInvalidArgument)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	shared, err := p.open(addr)
	if err != nil {
		return nil, err
	}
	if _, ok := shared.routes[cid]; ok {
		return nil, fmt.Errorf("listen on %s: cid %d is another sandbox's: %w", addr, cid, errdefs.ErrAlreadyExists)
	}
	r := &route{p: p, addr: addr, cid: cid, at: shared.listener.Addr(), conns: make(chan net.Conn, backlog), done: make(chan struct{})}
	shared.routes[cid] = r
	return r, nil
}

// open returns the shared port of an address. Precondition: p.mu is held.
func (p *ports) open(addr string) (*port, error) {
	if shared, ok := p.shared[addr]; ok {
		return shared, nil
	}
	l, err := p.bind(addr)
	if err != nil {
		return nil, err
	}
	shared := &port{addr: addr, listener: l, routes: map[uint32]*route{}}
	p.shared[addr] = shared
	p.wg.Go(func() { p.serve(shared) })
	return shared, nil
}

// serve hands out connections until the port is closed.
func (p *ports) serve(shared *port) {
	for {
		c, err := shared.listener.Accept()
		if passing(err) {
			time.Sleep(acceptPause)
			continue
		}
		if err != nil {
			p.fail(shared)
			return
		}
		cid, ok := p.peer(c)
		if !ok || !p.deliver(shared, c, cid) && !p.hold(shared, c, cid) {
			_ = c.Close() // refused, or nobody's
		}
	}
}

// acceptPause is before the next attempt, after one that failed for a reason
// that passes.
const acceptPause = 10 * time.Millisecond

// passing says whether Accept may succeed again (accept(2)): all sandboxes hang
// on a shared port, and any of them may have caused the want.
func passing(err error) bool {
	return slices.ContainsFunc([]error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED},
		func(e error) bool { return errors.Is(err, e) })
}

// deliver gives c to the sandbox with that cid, if it takes it.
func (p *ports) deliver(shared *port, c net.Conn, cid uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := shared.routes[cid]
	if r == nil {
		return false
	}
	select {
	case r.conns <- c:
		return true
	default:
		return false
	}
}

// hold keeps a connection that is nobody's while its sandbox is looked for: a
// guest may be faster than those who tell the node of it.
func (p *ports) hold(shared *port, c net.Conn, cid uint32) bool {
	p.mu.Lock()
	known := shared.routes[cid] != nil
	p.mu.Unlock()
	if known || p.find == nil {
		return false
	}
	select {
	case p.held <- struct{}{}:
	default:
		return false
	}
	p.wg.Go(func() {
		defer func() { <-p.held }()
		if !p.find(cid) || !p.deliver(shared, c, cid) {
			_ = c.Close() // nobody's
		}
	})
	return true
}

// fail ends the routes of a port that accepts no more.
func (p *ports) fail(shared *port) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range shared.routes {
		p.remove(r)
	}
	p.shut(shared)
}

// remove ends a route, and with its last one the port. Precondition: p.mu is
// held.
func (p *ports) remove(r *route) {
	shared := p.shared[r.addr]
	if shared == nil || shared.routes[r.cid] != r {
		return
	}
	delete(shared.routes, r.cid)
	close(r.done)
	for range len(r.conns) {
		_ = (<-r.conns).Close() // never served
	}
	if len(shared.routes) == 0 && !shared.kept {
		p.shut(shared)
	}
}

// route is a sandbox's share of a port.
type route struct {
	p     *ports
	addr  string
	cid   uint32
	at    net.Addr
	conns chan net.Conn
	done  chan struct{} // closed by remove
}

// Accept implements net.Listener.
func (r *route) Accept() (net.Conn, error) {
	select {
	case c := <-r.conns:
		return c, nil
	case <-r.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (r *route) Close() error {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	r.p.remove(r)
	return nil
}

// Addr implements net.Listener.
func (r *route) Addr() net.Addr { return r.at }
