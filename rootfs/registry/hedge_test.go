package registry_test

import (
	"bytes"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// hedging does not wait for a stall to end: only a second request helps.
func hedging() registry.Config {
	return registry.Config{RetryWait: time.Millisecond, Stall: time.Hour, Hedge: 100 * time.Millisecond}
}

// hostStats are the counters of a registry at a client.
func hostStats(t *testing.T, c *registry.Client, host string) registry.HostStats {
	t.Helper()
	for _, s := range c.Stats().Hosts {
		if s.Host == host {
			return s
		}
	}
	t.Fatalf("%s is not counted: %+v", host, c.Stats().Hosts)
	return registry.HostStats{}
}

// warm makes the client know that a host answers fast.
func warm(t *testing.T, repo *registry.Repository, p *pair, n int) {
	t.Helper()
	for range n {
		p.read(t, repo, 0, 1000)
	}
}

// TestHedge has one connection stand still for ever, at each place, and reads on
// over another one.
func TestHedge(t *testing.T) {
	const off, n = 1_000_000, 1_500_000
	for _, tc := range []struct {
		name   string
		effect registrytest.Effect
		at     int64 // where the second request begins
	}{
		{"before the header", registrytest.Delay(registrytest.Forever), 0},
		{"before the body", registrytest.Stall(0, registrytest.Forever), 0},
		{"in the body", registrytest.Stall(500_000, registrytest.Forever), 500_000},
	} {
		for _, opts := range []registrytest.Options{{}, {TLS: true}, {Redirect: true}} {
			t.Run(fmt.Sprintf("%s %+v", tc.name, opts), func(t *testing.T) {
				noLeak(t)
				reg := registrytest.Start(t, opts)
				p := &pair{data: random(3 << 20)}
				p.desc = reg.PushBlob("library/x", "", p.data)
				cfg := hedging()
				if opts.TLS {
					cfg.PlainHTTP, cfg.TLS = func(string) bool { return false }, reg.TLSConfig()
				}
				c := newClient(t, cfg)
				repo := repository(t, c, reg)
				warm(t, repo, p, 1)
				reg.Reset()
				reg.Fault(p.desc.Digest.String(), 1, tc.effect)
				p.read(t, repo, off, n)
				last := reg.Requests("/")
				want := fmt.Sprintf("bytes=%d-%d", off+tc.at, off+n-1)
				if len(last) != 2 || last[1].Range != want {
					t.Errorf("%d requests, the last one for %s, want 2 and %s", len(last), last[len(last)-1].Range, want)
				}
				if s := hostStats(t, c, reg.Host()); s.Hedges != 1 || s.Late != 1 || s.Retries != 0 {
					t.Errorf("counted %+v", s)
				}
			})
		}
	}
}

// TestHedgeNextHost asks the registry for what its mirror does not bring, and
// leaves the mirror alone when that happens too often.
func TestHedgeNextHost(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	cfg := hedging()
	cfg.Hedge = 20 * time.Millisecond
	m := withMirrors(t, cfg, p.origin, hostTable(p.mirror, ""))
	repo := repository(t, m.client, p.origin)
	warm(t, repo, p, 1)
	p.mirror.Fault("/blobs/", 0, registrytest.Stall(5000, registrytest.Forever))
	for range 5 {
		p.read(t, repo, 0, 100_000)
	}
	if asked(p.mirror) != 4 || asked(p.origin) != 5 {
		t.Errorf("the mirror was asked %d times, the registry %d times", asked(p.mirror), asked(p.origin))
	}
	if got := p.origin.Requests("/blobs/")[0].Range; got != "bytes=5000-99999" {
		t.Errorf("the registry was asked for %s", got)
	}
	if !bytes.Contains(m.log.Bytes(), []byte("a mirror fails")) {
		t.Errorf("logged %s", &m.log)
	}
}

// TestHedgeBounded has everything stand still: second requests are few.
func TestHedgeBounded(t *testing.T) {
	noLeak(t)
	reg := registrytest.Start(t, registrytest.Options{})
	p := &pair{data: random(1 << 20)}
	p.desc = reg.PushBlob("library/x", "", p.data)
	cfg := hedging()
	cfg.Stall, cfg.RetryMax = 2*time.Second, -1
	c := newClient(t, cfg)
	repo := repository(t, c, reg)
	warm(t, repo, p, 20)
	reg.Fault("/blobs/", 0, registrytest.Stall(10, registrytest.Forever))
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			rc, err := repo.Range(t.Context(), p.desc.Digest, 0, 1000)
			if _, err := readAll(t, rc, err); err == nil {
				t.Error("bytes out of nowhere")
			}
		})
	}
	wg.Wait()
	if s := hostStats(t, c, reg.Host()); s.Hedges == 0 || s.Hedges > 6 {
		t.Errorf("%d second requests for 36", s.Hedges)
	}
}

// TestHedgeNotWhenRefused sends nothing twice to a registry that refuses requests.
func TestHedgeNotWhenRefused(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	p := &pair{data: random(1 << 20)}
	p.desc = reg.PushBlob("library/x", "", p.data)
	cfg := hedging()
	cfg.Stall = time.Second
	c := newClient(t, cfg)
	repo := repository(t, c, reg)
	warm(t, repo, p, 1)
	reg.FaultFunc(func(r *http.Request) bool { return r.Header.Get("Range") == "bytes=0-1999" }, 1, registrytest.Status(429))
	reg.FaultFunc(func(r *http.Request) bool { return r.Header.Get("Range") == "bytes=0-1999" }, 2, registrytest.Stall(100, registrytest.Forever))
	p.read(t, repo, 0, 2000)
	if s := hostStats(t, c, reg.Host()); s.Hedges != 0 || s.Refused != 1 || s.Retries != 2 {
		t.Errorf("counted %+v", s)
	}
}
