package sched

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// answer sends to everybody who connects as many bytes as he asks for, again and again.
func answer(tb testing.TB, l net.Listener) {
	var wg sync.WaitGroup
	tb.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				b := make([]byte, maxAnswer)
				var n uint32
				for binary.Read(c, binary.BigEndian, &n) == nil {
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			})
		}
	})
}

const (
	maxAnswer    = 1 << 20 // of a batch stream, bytes
	onlineAnswer = 64 << 10
	onlineThinks = 20 * time.Millisecond
)

// asker asks over one connection for answers of n bytes until ctx ends, and tells how
// long each took, and what was read.
type asker struct {
	s     *sched.Scheduler
	addr  string
	class string
	flow  string
	n     int
	think time.Duration
	took  func(time.Duration)
	got   func(n int)
}

func (a asker) run(ctx context.Context) error {
	ctx = sched.With(ctx, sched.NewWork(sched.Standing{Flow: a.s.Flow(a.class, a.flow)}))
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", a.addr)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	for {
		start := time.Now()
		if err := a.ask(ctx, c); err != nil {
			return err
		}
		a.took(time.Since(start))
		time.Sleep(a.think)
	}
}

func (a asker) ask(ctx context.Context, c net.Conn) error {
	u := a.s.Upstream("registry")
	end, err := u.Begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	defer u.Uses(c)()
	if err := binary.Write(c, binary.BigEndian, uint32(a.n)); err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	for left := a.n; left > 0; {
		g, err := u.Receive(ctx, min(left, len(b)))
		if err != nil {
			return err
		}
		n, err := c.Read(b[:g.N])
		u.Received(g, n)
		a.got(n)
		if left -= n; err != nil && (!errors.Is(err, io.EOF) || left > 0) {
			return err
		}
	}
	return nil
}

// sample is one read of online.
type sample struct{ at, took time.Duration }

// BenchmarkOnlineInAStorm has online read a little now and then while 20 streams of batch
// start cold: online being there before, or coming to a link that batch fills. It reports
// how long its reads take, and what part of the link is used.
func BenchmarkOnlineInAStorm(b *testing.B) {
	for _, c := range []struct {
		name          string
		online, batch time.Duration // when they begin
	}{{"first", 0, time.Second}, {"together", 0, 0}, {"later", 4 * time.Second, 0}} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				inAStorm(b, c.online, c.batch)
			}
		})
	}
}

func inAStorm(b *testing.B, online, batch time.Duration) {
	l, err := listenBehindBucket(b)
	if err != nil {
		b.Skipf("needs network namespaces, veth and tbf: %v", err)
	}
	answer(b, l)
	s, err := sched.New(sched.Config{Off: os.Getenv("SCHED_OFF") != ""})
	if err != nil {
		b.Fatal(err)
	}
	begin := max(online, batch)
	ctx, cancel := context.WithTimeout(b.Context(), begin+stormTime)
	defer cancel()
	start := time.Now()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var samples []sample
	var bytes atomic.Int64
	at := func(d time.Duration, a asker, took func(at, took time.Duration)) {
		a.s, a.addr = s, l.Addr().String()
		a.got = func(n int) {
			if time.Since(start) > begin {
				bytes.Add(int64(n))
			}
		}
		a.took = func(d time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			if at := time.Since(start) - begin; at > 0 {
				took(at, d)
			}
		}
		wg.Go(func() { time.Sleep(d); _ = a.run(ctx) }) // it ends with ctx
	}
	at(online, asker{class: "online", n: onlineAnswer, think: onlineThinks}, func(at, took time.Duration) {
		samples = append(samples, sample{at, took})
	})
	for i := range 20 {
		at(batch, asker{class: "batch", flow: strconv.Itoa(i), n: maxAnswer}, func(time.Duration, time.Duration) {})
	}
	wg.Wait()
	report(b, samples, float64(bytes.Load())/stormTime.Seconds()/rate)
}

const stormTime = 10 * time.Second

func report(b *testing.B, samples []sample, used float64) {
	for _, part := range []struct {
		name     string
		from, to time.Duration
	}{{"start", 0, 2 * time.Second}, {"rest", 2 * time.Second, stormTime}, {"all", 0, stormTime}} {
		var d []time.Duration
		for _, s := range samples {
			if s.at >= part.from && s.at < part.to {
				d = append(d, s.took)
			}
		}
		slices.Sort(d)
		if len(d) == 0 {
			d = []time.Duration{stormTime} // not one read
		}
		b.ReportMetric(float64(d[len(d)/2].Microseconds())/1e3, part.name+"-p50-ms")
		b.ReportMetric(float64(d[len(d)*99/100].Microseconds())/1e3, part.name+"-p99-ms")
	}
	b.ReportMetric(100*used, "%used")
	b.ReportMetric(0, "ns/op")
}
