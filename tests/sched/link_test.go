package sched

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

const rate = 20 << 20 // bytes a second of the link, about

// listen returns a listener behind a token bucket of the kernel (tc-tbf(8)) of that rate,
// in a network namespace of its own. Package link would not do: it takes from a sender
// much more than a reader reads.
func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := listenBehindBucket(t)
	if err != nil {
		t.Skipf("needs network namespaces, veth and tbf: %v", err)
	}
	return l
}

// buckets counts those of this process.
var buckets atomic.Int32

func listenBehindBucket(t testing.TB) (net.Listener, error) {
	id := (os.Getpid()*8 + int(buckets.Add(1))) & 0x3fff // the kernel takes its time to remove one
	ns, veth := fmt.Sprint("tatami-sched-", id), fmt.Sprint("tts", id)
	ours, theirs := fmt.Sprintf("198.18.%d.%d", id>>6&0xff, id&0x3f<<2|1), fmt.Sprintf("198.18.%d.%d", id>>6&0xff, id&0x3f<<2|2)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() }) // takes the link with it
	for _, cmd := range []string{
		"ip netns add " + ns,
		"ip link add " + veth + "a type veth peer name " + veth + "b netns " + ns,
		"ip addr add " + ours + "/30 dev " + veth + "a",
		"ip link set " + veth + "a up",
		"ip -n " + ns + " addr add " + theirs + "/30 dev " + veth + "b",
		"ip -n " + ns + " link set " + veth + "b up",
		fmt.Sprintf("tc -n %s qdisc add dev %sb root tbf rate %d burst 64kb latency 50ms", ns, veth, 8*rate),
	} {
		args := strings.Fields(cmd)
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %w: %s", cmd, err, out)
		}
	}
	return listenIn(t.Context(), "/run/netns/"+ns, theirs+":0")
}

// listenIn listens in a network namespace.
func listenIn(ctx context.Context, ns, addr string) (l net.Listener, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // without Unlock: the thread ends with the goroutine
		var f *os.File
		if f, err = os.Open(ns); err != nil {
			return
		}
		defer f.Close()
		if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return
		}
		var lc net.ListenConfig
		l, err = lc.Listen(ctx, "tcp", addr)
	}()
	<-done
	return l, err
}

// serve sends to everybody who connects, without end.
func serve(t *testing.T, l net.Listener) {
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				b := make([]byte, 64<<10)
				for err := error(nil); err == nil; {
					_, err = c.Write(b)
				}
			})
		}
	})
}

// client reads over connections of its own.
type client struct {
	s    *sched.Scheduler
	addr string
	host string // what the scheduler calls it
	wg   sync.WaitGroup
	got  map[string]*atomic.Int64 // bytes, by class; immutable
}

func newClient(s *sched.Scheduler, addr, host string) *client {
	return &client{s: s, addr: addr, host: host, got: map[string]*atomic.Int64{"online": {}, "batch": {}}}
}

// read reads over n connections until ctx ends.
func (c *client) read(ctx context.Context, t *testing.T, class string, n int) {
	for range n {
		c.wg.Go(func() {
			if err := c.readOne(ctx, class); err != nil && ctx.Err() == nil {
				t.Errorf("read of %s: %v", class, err)
			}
		})
	}
}

func (c *client) readOne(ctx context.Context, class string) error {
	ctx = sched.With(ctx, sched.NewWork(sched.Standing{Flow: c.s.Flow(class, "1")}))
	u := c.s.Upstream(c.host)
	end, err := u.Begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", c.addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer u.Uses(conn)()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	b := make([]byte, 64<<10)
	for {
		g, err := u.Receive(ctx, len(b))
		if err != nil {
			return err
		}
		n, err := conn.Read(b[:g.N])
		u.Received(g, n)
		c.got[class].Add(int64(n))
		if err != nil {
			return err
		}
	}
}

// during returns what the classes get in some time.
func (c *client) during(d time.Duration) (online, batch float64) {
	o, b := c.got["online"].Load(), c.got["batch"].Load()
	time.Sleep(d)
	return float64(c.got["online"].Load() - o), float64(c.got["batch"].Load() - b)
}

// result is what one arm of the experiment measures, in bytes.
type result struct{ alone, online, batch float64 }

// storm lets batch read over 20 connections, then online over one besides, of what the
// scheduler knows as these hosts.
func storm(t *testing.T, cfg sched.Config, batch, online string) (r result) {
	l := listen(t)
	serve(t, l)
	s, err := sched.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c, o := newClient(s, l.Addr().String(), batch), newClient(s, l.Addr().String(), online)
	o.got = c.got
	ctx, cancel := context.WithCancel(t.Context())
	defer func() { cancel(); c.wg.Wait(); o.wg.Wait() }()
	c.read(ctx, t, "batch", 20)
	c.during(time.Second)
	_, r.alone = c.during(500 * time.Millisecond)
	o.read(ctx, t, "online", 1)
	c.during(time.Second)
	r.online, r.batch = c.during(time.Second)
	return r
}

// TestOneAgainstTwenty: where the link is the bottleneck, one connection of online gets
// much more beside twenty of batch than TCP alone gives it, and the link is used as
// before: of one registry and of two, the link's rate being measured or known. What one
// connection gets is also a matter of chance, above all when its first packets are lost:
// three attempts.
func TestOneAgainstTwenty(t *testing.T) {
	off := storm(t, sched.Config{Off: true}, "a", "a")
	for _, c := range []struct {
		name   string
		cfg    sched.Config
		online string // registry; that of batch is a
	}{
		{"one registry", sched.Config{}, "a"},
		{"two registries", sched.Config{}, "b"},
		{"two registries, known link", sched.Config{Link: rate * 95 / 100}, "b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var why error
			for range 3 {
				on := storm(t, c.cfg, "a", c.online)
				t.Logf("off: %.1f, on: %.1f (MB: batch alone, then online and batch)", mega(off), mega(on))
				if why = compare(off, on); why == nil {
					return
				}
			}
			t.Error(why)
		})
	}
}

func compare(off, on result) error {
	before, after := off.online/(off.online+off.batch), on.online/(on.online+on.batch)
	switch {
	case after < 0.1 || after < 3*before:
		return fmt.Errorf("online had %.1f%% of the bytes without the scheduler, and %.1f%% with it", 100*before, 100*after)
	case on.batch == 0:
		return errors.New("batch got nothing")
	case on.alone < 0.8*off.alone || on.online+on.batch < 0.8*(off.online+off.batch):
		return errors.New("the link is used less with the scheduler")
	}
	return nil
}

func mega(r result) []float64 { return []float64{r.alone / 1e6, r.online / 1e6, r.batch / 1e6} }

// TestCancelledReadsReturn: who reads, waits for bytes or for a request when everything
// ends is not left behind.
func TestCancelledReadsReturn(t *testing.T) {
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	s, err := sched.New(sched.Config{Link: rate / 4})
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(s, l.Addr().String(), "registry")
	ctx, cancel := context.WithCancel(t.Context())
	c.read(ctx, t, "batch", 50)
	c.during(200 * time.Millisecond)
	cancel()
	c.wg.Wait()
	for _, q := range s.Status().Queues {
		for _, class := range q.Classes {
			if class.Waiting != [3]int{} {
				t.Errorf("%s: of %s there wait %v", q.Name, class.Class, class.Waiting)
			}
		}
	}
	if err := ctx.Err(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}
