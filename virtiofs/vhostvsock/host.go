package vhostvsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// connectWait bounds each half of a connection's beginning: the CONNECT line, the
// guest's answer, the dial of the host peer.
const connectWait = 10 * time.Second

var errTimeout = errors.New("timed out")

// serveGuest serves a connection that the guest asked for.
func (c *conn) serveGuest() {
	defer c.finish()
	log := c.dev.cfg.Log.With("port", c.key.hostPort)
	if err := c.dialHost(); err != nil {
		log.Debug("refused a connection of the guest", "err", err)
		return
	}
	if err := c.send(opResponse, 0); err != nil {
		log.Debug("connection of the guest ended early", "err", err)
		return
	}
	c.pump()
}

func (c *conn) dialHost() error {
	ctx, cancel := context.WithTimeout(c.dev.ctx, connectWait)
	defer cancel()
	path := vsock.HybridListenPath(c.dev.cfg.Path, c.key.hostPort)
	var d net.Dialer
	sock, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	return c.attach(sock.(*net.UnixConn))
}

// serveHost serves a client on the node and closes sock.
func (d *Device) serveHost(sock *net.UnixConn) error {
	port, err := d.readConnect(sock)
	if err != nil {
		return errors.Join(err, sock.Close())
	}
	c := d.register(port)
	if c == nil {
		return errors.Join(fmt.Errorf("connect to port %d: more than %d connections", port, d.cfg.MaxConns), sock.Close())
	}
	defer c.finish()
	if err := c.attach(sock); err != nil {
		return err
	}
	if err := c.connectGuest(); err != nil {
		return fmt.Errorf("connect to port %d: %w", port, err)
	}
	if err := vsock.WriteOK(sock, c.key.hostPort); err != nil {
		return err
	}
	c.pump()
	return nil
}

func (d *Device) readConnect(sock *net.UnixConn) (uint32, error) {
	stop := context.AfterFunc(d.ctx, func() { _ = sock.SetDeadline(past()) })
	defer stop()
	if err := sock.SetReadDeadline(time.Now().Add(connectWait)); err != nil {
		return 0, err
	}
	port, err := vsock.ReadConnect(sock)
	if err != nil {
		return 0, err
	}
	return port, sock.SetReadDeadline(time.Time{})
}

// connectGuest asks the guest for the connection and waits for its answer.
func (c *conn) connectGuest() error {
	t := time.AfterFunc(connectWait, func() { c.abort(errTimeout) })
	defer t.Stop()
	if err := c.send(opRequest, 0); err != nil {
		if cause := c.failure(); cause != nil {
			return cause
		}
		c.abort(err) // no driver: nobody to send a reset to
		return err
	}
	select {
	case <-c.answered:
		return c.failure()
	case <-c.done:
		return c.failure()
	}
}
