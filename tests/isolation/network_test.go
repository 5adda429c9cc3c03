package isolation

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tools/link"
)

// Of the token bucket: what may pass at once, and the queue before it, which is that of
// a switch with little memory.
const tbfBurst, tbfQueue = "64kb", "1mb"

// network is a place from which what is sent comes over a link.
type network struct {
	tb       testing.TB
	ns       string // the namespace; empty where there is none
	dev      string
	listener net.Listener // of the registry
	address  string       // at which the registry is seen
	proxy    *link.Link
	shape    link.Shape
}

// newNetwork makes a link, which is as fast as it can be until limit is called.
func newNetwork(tb testing.TB, shape link.Shape) *network {
	tb.Helper()
	n := &network{tb: tb, shape: shape}
	if why := n.namespace(); why != nil {
		tb.Logf("no network namespace, tools/link stands in: %v", why)
		n.loopback()
	}
	return n
}

// networks counts those of this process.
var networks atomic.Int32

// namespace makes one, with a pair of veth devices, and listens in it. The subnet is
// one of 169.254/16 that is told apart by the process, as tests run beside each other.
func (n *network) namespace() error {
	id := (os.Getpid()*8 + int(networks.Add(1))) % 16000
	net4 := func(host int) string { return fmt.Sprintf("169.254.%d.%d", id/64, id%64*4+host) }
	name := fmt.Sprintf("tatami-iso-%d", id)
	out, in := fmt.Sprintf("tt%do", id), fmt.Sprintf("tt%di", id)
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	n.tb.Cleanup(func() {
		_ = exec.Command("ip", "link", "del", out).Run() // there is none when making it failed
		run(n.tb, "ip", "netns", "del", name)
	})
	for _, args := range [][]string{
		{"link", "add", out, "type", "veth", "peer", "name", in, "netns", name},
		{"addr", "add", net4(1) + "/30", "dev", out},
		{"link", "set", out, "up"},
		{"-n", name, "addr", "add", net4(2) + "/30", "dev", in},
		{"-n", name, "link", "set", in, "up"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
	}
	l, err := listenIn(name, net4(2)+":0")
	if err != nil {
		return err
	}
	n.ns, n.dev, n.listener, n.address = name, in, l, l.Addr().String()
	return nil
}

// listenIn listens in a network namespace: a socket stays in the one of the thread that
// made it (network_namespaces(7)).
func listenIn(ns, address string) (l net.Listener, err error) {
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		var f *os.File
		if f, err = os.Open("/run/netns/" + ns); err != nil {
			return
		}
		defer f.Close()
		if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err == nil {
			l, err = new(net.ListenConfig).Listen(context.Background(), "tcp4", address)
		}
	})
	wg.Wait()
	return l, err
}

// loopback has a proxy between two sockets of this machine.
func (n *network) loopback() {
	near, err := net.Listen("tcp", "127.0.0.1:0")
	check(n.tb, err)
	n.listener, err = net.Listen("tcp", "127.0.0.1:0")
	check(n.tb, err)
	n.address = near.Addr().String()
	n.proxy = link.New(n.listener.Addr().String(), link.Shape{Rate: n.shape.Rate})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- n.proxy.Serve(ctx, near) }()
	n.tb.Cleanup(func() { cancel(); check(n.tb, <-served) })
}

// limit gives the link its rate, or takes it away.
func (n *network) limit(on bool) {
	n.tb.Helper()
	if !on || n.shape.Rate == 0 {
		n.queue("pfifo")
		return
	}
	// The rate is of what is sent for the bytes of a stream: 1,514 for 1,448.
	n.rate(strconv.FormatInt(n.shape.Rate*8*1514/1448, 10) + "bit")
}

// rate gives the link another one; what waits in its queue stays there.
func (n *network) rate(r string) {
	n.tb.Helper()
	n.queue("tbf", "rate", r, "burst", tbfBurst, "limit", tbfQueue)
}

func (n *network) queue(q ...string) {
	n.tb.Helper()
	if n.ns != "" {
		run(n.tb, "tc", append([]string{"-n", n.ns, "qdisc", "replace", "dev", n.dev, "root"}, q...)...)
	}
}

// rtt is what the registry has to wait before it answers.
func (n *network) rtt() time.Duration { return n.shape.RTT }
