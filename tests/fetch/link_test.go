package fetch

import (
	"context"
	"fmt"
	"io"
	"math/rand"
	"net"
	"testing"
	"time"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/link"
)

// far is a registry behind a link, with one blob.
type far struct {
	reg  *registrytest.Server
	desc ocispec.Descriptor
	addr string // of the link's near end
}

func newFar(b *testing.B, opts registrytest.Options, shape string, size int) *far {
	b.Helper()
	sh, err := link.ParseShape(shape)
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, size)
	_, _ = rand.New(rand.NewSource(1)).Read(data) // never fails
	f := &far{reg: registrytest.Start(b, opts)}
	f.desc = f.reg.PushBlob("library/x", "", data)
	near, err := (&net.ListenConfig{}).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	f.addr = near.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- link.New(f.reg.Host(), sh).Serve(ctx, near) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return f
}

// slowConn brings so many bytes a second at most, as one connection of a
// registry's storage, or one that loses packets, does.
type slowConn struct {
	net.Conn
	rate int64
	free time.Time // when all that came is through
}

func (c *slowConn) Read(p []byte) (int, error) {
	time.Sleep(time.Until(c.free))
	n, err := c.Conn.Read(p)
	c.free = time.Now().Add(time.Duration(int64(n) * int64(time.Second) / c.rate))
	return n, err
}

// open reads the blob once, with a client that knows nothing yet.
func (f *far) open(b *testing.B, inFlight int, perConn int64) {
	b.Helper()
	c := registry.New(registry.Config{
		PlainHTTP: func(string) bool { return false }, TLS: f.reg.TLSConfig(),
		Chunk: 4 << 20, InFlight: inFlight,
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, f.addr)
			if err == nil && perConn > 0 {
				conn = &slowConn{Conn: conn, rate: perConn}
			}
			return conn, err
		},
	})
	defer func() { _ = c.Close() }() // never fails
	name, err := reference.ParseNormalizedNamed(f.reg.Host() + "/library/x")
	if err != nil {
		b.Fatal(err)
	}
	rc, err := c.Repository(name).Open(b.Context(), f.desc)
	if err != nil {
		b.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, rc); err != nil || n != f.desc.Size {
		b.Fatalf("%d bytes, %v", n, err)
	}
	if err := rc.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkLink reads a blob of 48 MiB over links, with HTTP/1.1 and HTTP/2, in
// one range at a time and in up to four. In some cases a connection brings
// 15 MB/s, whatever the link could.
func BenchmarkLink(b *testing.B) {
	for _, tc := range []struct {
		shape   string
		perConn int64
	}{{"1gbit,1ms", 0}, {"1gbit,40ms", 0}, {"1gbit,5ms", 15e6}} {
		for _, one := range []bool{true, false} {
			proto := "HTTP2"
			if one {
				proto = "HTTP1.1"
			}
			f := newFar(b, registrytest.Options{TLS: true, HTTP1: one}, tc.shape, 48<<20)
			for _, inFlight := range []int{1, 4} {
				b.Run(fmt.Sprintf("%s,%d/%s/%d", tc.shape, tc.perConn, proto, inFlight), func(b *testing.B) {
					b.SetBytes(f.desc.Size)
					for b.Loop() {
						f.open(b, inFlight, tc.perConn)
					}
				})
			}
		}
	}
}
