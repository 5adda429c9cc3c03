package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// noLeak checks, when client and servers of the test are closed, that none of
// this package's goroutines and no connection is left.
func noLeak(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		buf := make([]byte, 1<<20)
		for range 500 {
			stacks := string(buf[:runtime.Stack(buf, true)])
			if !strings.Contains(stacks, "rootfs/registry.(") && !strings.Contains(stacks, "net/http.(*persistConn)") {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("goroutines are left:\n%s", buf[:runtime.Stack(buf, true)])
	})
}

// small has chunks that make many parallel ranges of a test's blob.
func small() registry.Config {
	cfg := fast()
	cfg.Chunk = 100_000
	return cfg
}

func TestOpen(t *testing.T) {
	for _, opts := range []registrytest.Options{{}, {NoRange: true}, {Redirect: true}, {TLS: true}} {
		for _, size := range []int{0, 1, 99_999, 100_000, 100_001, 400_000, 1_234_567} {
			t.Run(fmt.Sprintf("%+v %d", opts, size), func(t *testing.T) {
				noLeak(t)
				reg := registrytest.Start(t, opts)
				data := random(size)
				desc := reg.PushBlob("library/x", "", data)
				cfg := small()
				if opts.TLS {
					cfg.PlainHTTP, cfg.TLS = func(string) bool { return false }, reg.TLSConfig()
				}
				repo := repository(t, newClient(t, cfg), reg)
				for range 2 { // the second time with what was learnt
					rc, err := repo.Open(t.Context(), desc)
					got, err := readAll(t, rc, err)
					if err != nil || !bytes.Equal(got, data) {
						t.Fatalf("%v, %d bytes", err, len(got))
					}
				}
				if sent := reg.BlobStats(desc.Digest).Bytes; sent != 2*int64(size) {
					t.Errorf("%d bytes were sent for a blob of %d, twice", sent, size)
				}
				if repo.Ranged() == opts.NoRange && size > 100_000 {
					t.Errorf("Ranged is %v", repo.Ranged())
				}
			})
		}
	}
}

// TestOpenRandomFaults reads blobs while every other answer is spoiled.
func TestOpenRandomFaults(t *testing.T) {
	effects := []registrytest.Effect{
		registrytest.Truncate(0), registrytest.Truncate(7), registrytest.Truncate(60_000),
		registrytest.Stall(30_000, registrytest.Forever), registrytest.Status(503),
		registrytest.Status(429, "Retry-After", "0"), registrytest.NoRange(), registrytest.ShiftRange(3),
		registrytest.Chunked(), registrytest.Delay(time.Millisecond),
	}
	for seed := range int64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			dice := rand.New(rand.NewSource(seed))
			reg := registrytest.Start(t, registrytest.Options{Redirect: seed%2 == 1})
			data := random(2_000_003)
			desc := reg.PushBlob("library/x", "", data)
			for _, effect := range effects {
				reg.FaultFunc(func(r *http.Request) bool { return r.Header.Get("Range") != "" && dice.Intn(16) == 0 }, 0, effect)
			}
			cfg := small()
			cfg.RetryMax, cfg.Stall = 30, 100*time.Millisecond
			repo := repository(t, newClient(t, cfg), reg)
			rc, err := repo.Open(t.Context(), desc)
			got, err := readAll(t, rc, err)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%v, %d bytes, equal %v", err, len(got), bytes.Equal(got, data))
			}
		})
	}
}

// TestOpenBounded does not read on while nobody reads the stream.
func TestOpenBounded(t *testing.T) {
	noLeak(t)
	reg := registrytest.Start(t, registrytest.Options{})
	desc := reg.PushBlob("library/x", "", random(3_000_000))
	cfg := small()
	cfg.InFlight = 3
	repo := repository(t, newClient(t, cfg), reg)
	rc, err := repo.Open(t.Context(), desc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(rc, make([]byte, 150_000)); err != nil {
		t.Fatal(err)
	}
	if n := len(reg.Requests("/blobs/")); n > 4 {
		t.Errorf("%d ranges were asked for after one and a half", n)
	}
	if err := rc.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := rc.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a closed stream gives %v", err)
	}
}

// TestOpenReusesBuffers reads a blob of many chunks.
func TestOpenReusesBuffers(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	desc := reg.PushBlob("library/x", "", random(64<<20))
	cfg := fast()
	cfg.Chunk = 1 << 20
	repo := repository(t, newClient(t, cfg), reg)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	rc, err := repo.Open(t.Context(), desc)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, rc)
	if err != nil || n != desc.Size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if err := rc.Close(); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
		t.Errorf("%d bytes were allocated for 4 chunks of %d in flight", used, cfg.Chunk)
	}
}

// TestOpenReadsWhatIsThere gets the first bytes while the rest of their range
// stands still.
func TestOpenReadsWhatIsThere(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	data := random(300_000)
	desc := reg.PushBlob("library/x", "", data)
	reg.Fault("/blobs/", 0, registrytest.Stall(50_000, registrytest.Forever))
	cfg := small()
	cfg.Stall = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	rc, err := repository(t, newClient(t, cfg), reg).Open(ctx, desc)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 50_000)
	if _, err := io.ReadFull(rc, got); err != nil || !bytes.Equal(got, data[:50_000]) {
		t.Errorf("first bytes: %v", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := rc.Read(got); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled read: %v", err)
		}
	})
	cancel()
	wg.Wait()
	if err := rc.Close(); err != nil {
		t.Error(err)
	}
}

// TestOpenClose closes streams whose ranges all stand still.
func TestOpenClose(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	desc := reg.PushBlob("library/x", "", random(1_000_000))
	reg.Fault("/blobs/", 0, registrytest.Stall(10, registrytest.Forever))
	cfg := small()
	cfg.Stall = time.Hour
	repo := repository(t, newClient(t, cfg), reg)
	for range 20 { // a goroutine that is not waited for may be gone in time
		reg.Reset()
		rc, err := repo.Open(t.Context(), desc)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(rc, make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		for len(reg.Requests("/blobs/")) < 2 {
			time.Sleep(time.Millisecond)
		}
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
		buf := make([]byte, 1<<20)
		if stacks := buf[:runtime.Stack(buf, true)]; bytes.Contains(stacks, []byte("registry.(*stream).fetch")) {
			t.Fatalf("a closed stream is still at work:\n%s", stacks)
		}
	}
}

// foreign is a context that the standard library does not know: each context
// derived from it has a goroutine until it is cancelled.
type foreign struct {
	context.Context
	done chan struct{}
}

func (f foreign) Done() <-chan struct{} { return f.done }

// TestContextsEnd reads in all ways under one context that lives on: nothing
// derived from it may.
func TestContextsEnd(t *testing.T) {
	ctx := foreign{t.Context(), make(chan struct{})}
	reg := registrytest.Start(t, registrytest.Options{Redirect: true, Auth: &registrytest.Auth{}})
	img := reg.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{{Blob: random(500_000)}}})
	repo := repository(t, newClient(t, small()), reg)
	for range 3 {
		if _, err := repo.Resolve(ctx, "v1"); err != nil {
			t.Error(err)
		}
		if _, err := repo.Manifest(ctx, img.Desc); err != nil {
			t.Error(err)
		}
		if _, err := repo.Blob(ctx, img.Layers[0]); err != nil {
			t.Error(err)
		}
		if _, err := repo.Range(ctx, digest.FromString("x"), 0, 1); !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		if _, err := repo.Referrers(ctx, img.Desc.Digest, ""); err != nil {
			t.Error(err)
		}
	}
	buf := make([]byte, 1<<20)
	for range 500 {
		if !bytes.Contains(buf[:runtime.Stack(buf, true)], []byte("propagateCancel")) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("contexts are left:\n%s", buf[:runtime.Stack(buf, true)])
}

func TestOpenFails(t *testing.T) {
	data := random(500_000)
	good := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
	resized := func(n int64) ocispec.Descriptor { return ocispec.Descriptor{Digest: good.Digest, Size: n} }
	for _, tc := range []struct {
		name    string
		desc    ocispec.Descriptor
		effects []registrytest.Effect
		class   func(error) bool
	}{
		{"longer than said", resized(499_999), nil, errdefs.IsDataLoss},
		{"shorter than said", resized(500_001), nil, errdefs.IsDataLoss},
		{"one stream, longer than said", resized(99_999), nil, errdefs.IsDataLoss},
		{"no ranges, longer than said", resized(499_999), []registrytest.Effect{registrytest.NoRange()}, errdefs.IsDataLoss},
		{"no ranges, chunked, longer than said", resized(499_999), []registrytest.Effect{registrytest.NoRange(), registrytest.Chunked()}, errdefs.IsDataLoss},
		{"no ranges, shorter than said", resized(500_001), []registrytest.Effect{registrytest.NoRange()}, errdefs.IsDataLoss},
		{"negative size", resized(-1), nil, errdefs.IsInvalidArgument},
		{"no digest", ocispec.Descriptor{Size: 10}, nil, errdefs.IsInvalidArgument},
		{"unknown", ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1 << 40}, nil, errdefs.IsNotFound},
		{"down", good, []registrytest.Effect{registrytest.Status(500)}, errdefs.IsUnavailable},
		{"short", good, []registrytest.Effect{registrytest.Truncate(100)}, errdefs.IsUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			noLeak(t)
			reg := registrytest.Start(t, registrytest.Options{})
			reg.PushBlob("library/x", "", data)
			if tc.effects != nil {
				reg.Fault("/blobs/", 0, tc.effects...)
			}
			rc, err := repository(t, newClient(t, small()), reg).Open(t.Context(), tc.desc)
			if _, err := readAll(t, rc, err); err == nil || !tc.class(err) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestOpenLastRangeFails keeps what came before an error readable.
func TestOpenLastRangeFails(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	data := random(350_000)
	desc := reg.PushBlob("library/x", "", data)
	reg.FaultFunc(func(r *http.Request) bool { return strings.HasPrefix(r.Header.Get("Range"), "bytes=300000-") }, 0, registrytest.Status(404))
	rc, err := repository(t, newClient(t, small()), reg).Open(t.Context(), desc)
	got, err := readAll(t, rc, err)
	if !errdefs.IsNotFound(err) || !bytes.Equal(got, data[:300_000]) {
		t.Errorf("%v after %d bytes", err, len(got))
	}
}

func BenchmarkOpen(b *testing.B) {
	reg := registrytest.Start(b, registrytest.Options{})
	desc := reg.PushBlob("library/x", "", random(256<<20))
	for _, inFlight := range []int{1, 4} {
		b.Run(fmt.Sprintf("%d in flight", inFlight), func(b *testing.B) {
			cfg := fast()
			cfg.InFlight = inFlight
			c := registry.New(cfg)
			defer func() { _ = c.Close() }() // never fails
			b.SetBytes(desc.Size)
			b.ReportAllocs()
			for b.Loop() {
				rc, err := c.Repository(benchName(b, reg)).Open(b.Context(), desc)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, rc); err != nil {
					b.Fatal(err)
				}
				if err := rc.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
