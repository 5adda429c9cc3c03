package fetch

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/distribution/reference"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// scheduled returns the blob's repository for a client with a scheduler, which may be nil.
func (f *far) scheduled(tb testing.TB, s *sched.Scheduler, perConn int64) *registry.Repository {
	tb.Helper()
	c := registry.New(registry.Config{
		PlainHTTP: func(string) bool { return false }, TLS: f.reg.TLSConfig(), Sched: s,
		Chunk: 4 << 20, InFlight: 4,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, f.addr)
			if err == nil && perConn > 0 {
				conn = &slowConn{Conn: conn, rate: perConn}
			}
			return conn, err
		},
	})
	tb.Cleanup(func() { _ = c.Close() }) // never fails
	name, err := reference.ParseNormalizedNamed(f.reg.Host() + "/library/x")
	if err != nil {
		tb.Fatal(err)
	}
	return c.Repository(name)
}

// pull reads the blob once.
func (f *far) pull(ctx context.Context, tb testing.TB, r *registry.Repository) {
	rc, err := r.Open(ctx, f.desc)
	if err != nil {
		tb.Error(err)
		return
	}
	defer rc.Close()
	if n, err := io.Copy(io.Discard, rc); err != nil || n != f.desc.Size {
		tb.Errorf("%d bytes, %v", n, err)
	}
}

// scheduler is one that is "on" or "off", or nil.
func scheduler(tb testing.TB, kind string) *sched.Scheduler {
	tb.Helper()
	if kind == "nil" {
		return nil
	}
	s, err := sched.New(sched.Config{Off: kind == "off"})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// BenchmarkScheduled reads a blob with no scheduler, with one that is off, and with one;
// one stream, or four at the same time.
func BenchmarkScheduled(b *testing.B) {
	for _, tc := range []struct {
		shape   string
		perConn int64
		size    int
	}{{"400mbit,1ms", 0, 48 << 20}, {"400mbit,40ms", 0, 48 << 20}, {"1gbit,5ms", 15e6, 48 << 20}, {"", 0, 256 << 20}} {
		for _, one := range []bool{true, false} {
			proto := "HTTP2"
			if one {
				proto = "HTTP1.1"
			}
			f := newFar(b, registrytest.Options{TLS: true, HTTP1: one}, tc.shape, tc.size)
			for _, streams := range []int{1, 4} {
				for _, kind := range []string{"nil", "off", "on"} {
					b.Run(fmt.Sprintf("%s,%d/%s/%d/%s", tc.shape, tc.perConn, proto, streams, kind), func(b *testing.B) {
						r := f.scheduled(b, scheduler(b, kind), tc.perConn)
						b.SetBytes(f.desc.Size * int64(streams))
						for b.Loop() {
							var wg sync.WaitGroup
							for range streams {
								wg.Go(func() { f.pull(b.Context(), b, r) })
							}
							wg.Wait()
						}
					})
				}
			}
		}
	}
}
