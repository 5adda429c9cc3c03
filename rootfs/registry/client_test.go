package registry_test

import (
	"bytes"
	"context"
	"io"
	"math/rand"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// fast has waits that suit a test.
func fast() registry.Config {
	return registry.Config{RetryWait: time.Millisecond, Stall: 5 * time.Second}
}

func newClient(t *testing.T, cfg registry.Config) *registry.Client {
	t.Helper()
	c := registry.New(cfg)
	t.Cleanup(func() { _ = c.Close() }) // never fails
	return c
}

// repository is library/x of the registry.
func repository(t *testing.T, c *registry.Client, reg *registrytest.Server) *registry.Repository {
	t.Helper()
	name, err := reference.ParseNormalizedNamed(reg.Host() + "/library/x")
	if err != nil {
		t.Fatal(err)
	}
	return c.Repository(name)
}

// random returns n bytes that do not repeat, the same ones in every run.
func random(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewSource(int64(n)))
	_, _ = r.Read(b) // never fails
	return b
}

// readAll reads to the end and closes.
func readAll(t *testing.T, rc io.ReadCloser, err error) ([]byte, error) {
	t.Helper()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err := rc.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}()
	return io.ReadAll(rc)
}

func TestImageRoundTrip(t *testing.T) {
	for _, tc := range []struct {
		name string
		opts registrytest.Options
		http int
	}{
		{"plain", registrytest.Options{}, 1},
		{"TLS", registrytest.Options{TLS: true}, 2},
		{"redirect", registrytest.Options{Redirect: true}, 1},
		{"TLS redirect token", registrytest.Options{TLS: true, Redirect: true, Auth: &registrytest.Auth{}}, 2},
		{"no digest header", registrytest.Options{NoDigest: true}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx := t.Context()
			reg := registrytest.Start(t, tc.opts)
			layer := registrytest.Layer{Blob: random(1 << 20), MediaType: "application/x"}
			img := reg.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
			cfg := fast()
			if tc.opts.TLS {
				cfg.PlainHTTP = func(string) bool { return false }
				cfg.TLS = reg.TLSConfig()
			}
			repo := repository(t, newClient(t, cfg), reg)
			desc, err := repo.Resolve(ctx, "v1")
			if err != nil {
				t.Fatal(err)
			}
			if desc.Digest != img.Desc.Digest || desc.Size != img.Desc.Size || desc.MediaType != img.Desc.MediaType {
				t.Errorf("resolved to %+v, pushed %+v", desc, img.Desc)
			}
			data, err := repo.Manifest(ctx, desc)
			if err != nil || !bytes.Equal(data, img.Manifest) {
				t.Errorf("manifest: %v, %d bytes", err, len(data))
			}
			if _, err := repo.Blob(ctx, img.Config); err != nil {
				t.Errorf("config: %v", err)
			}
			rc, err := repo.Range(ctx, img.Layers[0].Digest, 1000, 5000)
			got, err := readAll(t, rc, err)
			if err != nil || !bytes.Equal(got, layer.Blob[1000:6000]) {
				t.Errorf("range: %v, %d bytes", err, len(got))
			}
			for _, r := range reg.Requests("/v2/") {
				if r.Proto != tc.http {
					t.Errorf("%s went over HTTP/%d, want %d", r.Path, r.Proto, tc.http)
				}
			}
		})
	}
}

func TestLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "localhost:5000": true, "127.0.0.1:80": true, "127.1.2.3": true,
		"[::1]:5000": true, "[::1]": true, "::1": true, "10.0.0.1:5000": false,
		"localhost.example.com": false, "registry.example.com:5000": false, "": false, "[": false,
	} {
		if got := registry.Loopback(host); got != want {
			t.Errorf("Loopback(%q) is %v", host, got)
		}
	}
	plain := registry.PlainHTTPHosts([]string{"10.0.0.1:5000"})
	if !plain("10.0.0.1:5000") || plain("10.0.0.1:5001") || !plain("localhost:1") {
		t.Error("PlainHTTPHosts does not hold to its list")
	}
}

// TestMirror reads over a connection that is no TCP connection, as the relay
// on vsock is, and asks for a name of another registry.
func TestMirror(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", t.TempDir()+"/relay")
	if err != nil {
		t.Fatal(err)
	}
	reg := registrytest.Start(t, registrytest.Options{Listener: listener})
	data := random(100_000)
	id := digest.FromString("a table")
	reg.PushSegment("library/x", id, data)
	img := reg.PushImage("library/x", "latest", registrytest.Image{})

	cfg := fast()
	cfg.PlainHTTP = func(host string) bool { return host == "relay" }
	cfg.Dial = func(ctx context.Context, _, addr string) (net.Conn, error) {
		if addr != "relay:80" {
			t.Errorf("dialled %q", addr)
		}
		return (&net.Dialer{}).DialContext(ctx, "unix", listener.Addr().String())
	}
	name, err := reference.ParseNormalizedNamed("x")
	if err != nil {
		t.Fatal(err)
	}
	repo := newClient(t, cfg).Mirror("relay", name)
	desc, err := repo.Resolve(t.Context(), "latest")
	if err != nil || desc.Digest != img.Desc.Digest {
		t.Fatalf("resolved %s: %v", desc.Digest, err)
	}
	rc, err := repo.SegmentRange(t.Context(), id, 4096, 8192)
	got, err := readAll(t, rc, err)
	if err != nil || !bytes.Equal(got, data[4096:4096+8192]) {
		t.Errorf("segment: %v, %d bytes", err, len(got))
	}
	if _, err := repo.SegmentRange(t.Context(), digest.FromString("other"), 0, 1); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown segment gives %v", err)
	}
	for _, r := range reg.Requests("/v2/") {
		if r.Query != "ns=docker.io" {
			t.Errorf("%s was asked with query %q", r.Path, r.Query)
		}
	}
}

func TestDockerHubName(t *testing.T) {
	name, err := reference.ParseNormalizedNamed("debian")
	if err != nil {
		t.Fatal(err)
	}
	repo := registry.New(registry.Config{}).Repository(name)
	if repo.Host() != "registry-1.docker.io" || repo.Name() != "docker.io/library/debian" {
		t.Errorf("host %q, name %q", repo.Host(), repo.Name())
	}
}

func TestStatsCountWhatTheServerSent(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	desc := reg.PushBlob("library/x", "", random(50_000))
	reg.FaultFunc(func(r *http.Request) bool {
		if enc := r.Header.Get("Accept-Encoding"); enc != "identity" {
			t.Errorf("encoding %q was accepted for a range", enc)
		}
		return false
	}, 0)
	c := newClient(t, fast())
	repo := repository(t, c, reg)
	for off := int64(0); off < 50_000; off += 10_000 {
		rc, err := repo.Range(t.Context(), desc.Digest, off, 10_000)
		if _, err := readAll(t, rc, err); err != nil {
			t.Fatal(err)
		}
	}
	if s := c.Stats(); s.Bytes != 50_000 || s.Requests != 5 || s.Retries != 0 {
		t.Errorf("counted %+v", s)
	}
	if got := reg.BlobStats(desc.Digest); got.Bytes != 50_000 || got.Requests != 5 {
		t.Errorf("the server counted %+v", got)
	}
}

func benchName(b *testing.B, reg *registrytest.Server) reference.Named {
	b.Helper()
	name, err := reference.ParseNormalizedNamed(reg.Host() + "/library/x")
	if err != nil {
		b.Fatal(err)
	}
	return name
}
