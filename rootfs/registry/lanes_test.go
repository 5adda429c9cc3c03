package registry_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestLanes counts the connections that ranges take: one when they follow each
// other, one for each at the same time, whatever the protocol.
func TestLanes(t *testing.T) {
	for _, one := range []bool{true, false} {
		t.Run(fmt.Sprintf("HTTP1 %v", one), func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{TLS: true, HTTP1: one})
			desc := reg.PushBlob("library/x", "", random(4<<20))
			var dials atomic.Int64
			cfg := fast()
			cfg.PlainHTTP, cfg.TLS = func(string) bool { return false }, reg.TLSConfig()
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				dials.Add(1)
				return (&net.Dialer{}).DialContext(ctx, network, addr)
			}
			repo := repository(t, newClient(t, cfg), reg)
			for range 6 {
				rc, err := repo.Range(t.Context(), desc.Digest, 10, 1000)
				if _, err := readAll(t, rc, err); err != nil {
					t.Fatal(err)
				}
			}
			if n := dials.Load(); n != 1 {
				t.Errorf("%d connections for one range at a time", n)
			}
			for i := range 4 {
				rc, err := repo.Range(t.Context(), desc.Digest, int64(i), 4<<20-4)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = rc.Close() }() // the server is closed next
				if _, err := io.ReadFull(rc, make([]byte, 1000)); err != nil {
					t.Fatal(err)
				}
			}
			if n := dials.Load(); n != 4 {
				t.Errorf("%d connections for four ranges at the same time", n)
			}
		})
	}
}
