package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestRangeSurvives reads one range through each fault that passes.
func TestRangeSurvives(t *testing.T) {
	data := random(3 << 20)
	const off, n = 1_000_000, 1_500_000
	for _, tc := range []struct {
		name     string
		count    int
		effects  []registrytest.Effect
		requests int
	}{
		{"no fault", 1, nil, 1},
		{"500", 2, []registrytest.Effect{registrytest.Status(500)}, 3},
		{"502", 2, []registrytest.Effect{registrytest.Status(502)}, 3},
		{"503 Retry-After", 2, []registrytest.Effect{registrytest.Status(503, "Retry-After", "0")}, 3},
		{"429", 2, []registrytest.Effect{registrytest.Status(429)}, 3},
		{"429 Retry-After", 2, []registrytest.Effect{registrytest.Status(429, "Retry-After", "0")}, 3},
		{"429 Retry-After a past date", 1, []registrytest.Effect{registrytest.Status(429, "Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")}, 2},
		{"no body", 1, []registrytest.Effect{registrytest.Truncate(0)}, 2},
		{"short body", 1, []registrytest.Effect{registrytest.Truncate(700_000)}, 2},
		{"short bodies", 4, []registrytest.Effect{registrytest.Truncate(300_000)}, 5},
		{"more short bodies than retries", 20, []registrytest.Effect{registrytest.Truncate(270_000)}, 6},
		{"stall at the start", 1, []registrytest.Effect{registrytest.Stall(0, registrytest.Forever)}, 2},
		{"stall in the middle", 2, []registrytest.Effect{registrytest.Stall(500_000, registrytest.Forever)}, 3},
		{"no header", 1, []registrytest.Effect{registrytest.Delay(registrytest.Forever)}, 2},
		{"range of other bytes", 1, []registrytest.Effect{registrytest.ShiftRange(-1)}, 2},
		{"no ranges", 1, []registrytest.Effect{registrytest.NoRange()}, 1},
		{"no ranges, chunked", 1, []registrytest.Effect{registrytest.NoRange(), registrytest.Chunked()}, 1},
		{"no ranges, short in the skipped part", 2, []registrytest.Effect{registrytest.NoRange(), registrytest.Truncate(5000)}, 3},
		{"no ranges, short in the range", 2, []registrytest.Effect{registrytest.NoRange(), registrytest.Truncate(1_700_000)}, 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			desc := reg.PushBlob("library/x", "", data)
			reg.Fault("/blobs/", tc.count, tc.effects...)
			cfg := fast()
			stalls := strings.HasPrefix(tc.name, "stall") || tc.name == "no header"
			if stalls {
				cfg.Stall = 200 * time.Millisecond
			}
			repo := repository(t, newClient(t, cfg), reg)
			rc, err := repo.Range(t.Context(), desc.Digest, off, n)
			got, err := readAll(t, rc, err)
			if err != nil || !bytes.Equal(got, data[off:off+n]) {
				t.Fatalf("%v, %d bytes", err, len(got))
			}
			// On a busy machine a short stall time sees more stalls than there are.
			if asked := len(reg.Requests("/blobs/")); asked < tc.requests || asked > tc.requests && !stalls {
				t.Errorf("%d requests, want %d", asked, tc.requests)
			}
		})
	}
}

// TestRangeFails checks the class of each final error, that permanent ones
// are not tried again, and that the others are given up.
func TestRangeFails(t *testing.T) {
	for _, tc := range []struct {
		name     string
		effect   registrytest.Effect
		class    func(error) bool
		requests int
		text     string
	}{
		{"400", registrytest.Status(400), errdefs.IsInvalidArgument, 1, "INJECTED"},
		{"401", registrytest.Status(401), errdefs.IsUnauthorized, 1, "no credentials"},
		{"403", registrytest.Status(403), errdefs.IsPermissionDenied, 1, "allow to pull"},
		{"404", registrytest.Status(404), errdefs.IsNotFound, 1, "pushed"},
		{"416", registrytest.Status(416), errdefs.IsOutOfRange, 1, ""},
		{"418", registrytest.Status(418), errdefs.IsUnavailable, 1, "418"},
		{"429", registrytest.Status(429), errdefs.IsResourceExhausted, 3, "mirror"},
		{"429 for an hour", registrytest.Status(429, "Retry-After", "3600"), errdefs.IsResourceExhausted, 1, "1h0m0s"},
		{"503 for an hour", registrytest.Status(503, "Retry-After", "3600"), errdefs.IsResourceExhausted, 1, "1h0m0s"},
		{"500", registrytest.Status(500), errdefs.IsUnavailable, 3, "500"},
		{"short bodies", registrytest.Truncate(1000), isShort, 4, "unexpected EOF"},
		{"stalls", registrytest.Stall(1000, registrytest.Forever), errdefs.IsUnavailable, 4, "no byte came for too long (100ms)"},
		{"no header", registrytest.Delay(registrytest.Forever), errdefs.IsUnavailable, 3, "timeout"},
		{"other range", registrytest.ShiftRange(1), errdefs.IsDataLoss, 3, "Content-Range"},
		{"endless redirects", registrytest.Status(307, "Location", "/v2/library/x/blobs/x"), errdefs.IsUnavailable, 0, "redirects"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			desc := reg.PushBlob("library/x", "", random(100_000))
			reg.PushBlobAs("library/x", "x", nil)
			reg.Fault("/blobs/", 0, tc.effect)
			cfg := fast()
			cfg.RetryMax = 2
			if tc.name == "stalls" || tc.name == "no header" {
				cfg.Stall = 100 * time.Millisecond
			}
			repo := repository(t, newClient(t, cfg), reg)
			rc, err := repo.Range(t.Context(), desc.Digest, 5000, 50_000)
			_, err = readAll(t, rc, err)
			if err == nil || !tc.class(err) || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("error %v", err)
			}
			if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v looks like the end of the caller's context", err)
			}
			for _, part := range []string{reg.Host(), "library/x", desc.Digest.String()} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q does not name %s", err, part)
				}
			}
			if n := len(reg.Requests("/blobs/")); tc.requests != 0 && n > tc.requests {
				t.Errorf("%d requests, want %d", n, tc.requests)
			}
		})
	}
}

// TestSegmentErrorsAreFinal takes a relay's error answer for final, but not a lost
// connection.
func TestSegmentErrorsAreFinal(t *testing.T) {
	for _, tc := range []struct {
		name     string
		effect   registrytest.Effect
		requests int
	}{
		{"answer", registrytest.Status(503), 1},
		{"no answer", registrytest.Truncate(0), 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			data := random(1000)
			id := digest.FromBytes(data)
			reg.PushSegment("library/x", id, data)
			reg.Fault("/segments/", 0, tc.effect)
			rc, err := repository(t, newClient(t, fast()), reg).SegmentRange(t.Context(), id, 0, 100)
			if _, err = readAll(t, rc, err); !errdefs.IsUnavailable(err) {
				t.Errorf("error %v", err)
			}
			if n := len(reg.Requests("/segments/")); n != tc.requests {
				t.Errorf("%d requests, want %d", n, tc.requests)
			}
		})
	}
}

func isShort(err error) bool {
	return errdefs.IsUnavailable(err) && errors.Is(err, io.ErrUnexpectedEOF)
}

func TestRangeArguments(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	desc := reg.PushBlob("library/x", "", random(1000))
	repo := repository(t, newClient(t, fast()), reg)
	for _, tc := range []struct {
		name   string
		digest digest.Digest
		off, n int64
		class  func(error) bool
	}{
		{"negative offset", desc.Digest, -1, 10, errdefs.IsInvalidArgument},
		{"negative length", desc.Digest, 0, -1, errdefs.IsInvalidArgument},
		{"overflow", desc.Digest, 10, 1<<63 - 5, errdefs.IsInvalidArgument},
		{"path as digest", "sha256:../../x", 0, 10, errdefs.IsInvalidArgument},
		{"behind the end", desc.Digest, 1000, 1, errdefs.IsOutOfRange},
		{"over the end", desc.Digest, 999, 2, errdefs.IsOutOfRange},
		{"unknown blob", digest.FromString("x"), 0, 1, errdefs.IsNotFound},
	} {
		if _, err := repo.Range(t.Context(), tc.digest, tc.off, tc.n); !tc.class(err) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	rc, err := repo.Range(t.Context(), desc.Digest, 1000, 0)
	if got, err := readAll(t, rc, err); err != nil || len(got) != 0 {
		t.Errorf("empty range: %v, %d bytes", err, len(got))
	}
	blob := repo.LayerBlob(desc)
	if _, err := blob.ReadRange(t.Context(), 999, 2); !errdefs.IsOutOfRange(err) || blob.Size() != 1000 {
		t.Errorf("over the end of a layer blob: %v", err)
	}
	desc.Size++
	if _, err := repo.LayerBlob(desc).ReadRange(t.Context(), 0, 10); !errdefs.IsDataLoss(err) {
		t.Errorf("a blob of another size: %v", err)
	}
}

func TestManifestChecks(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	img := reg.PushImage("library/x", "v1", registrytest.Image{})
	repo := repository(t, newClient(t, fast()), reg)
	ctx := t.Context()

	if _, err := repo.Resolve(ctx, "v2"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown tag: %v", err)
	}
	if _, _, err := repo.GetManifest(ctx, "v2"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "MANIFEST_UNKNOWN") {
		t.Errorf("unknown tag: %v", err)
	}
	if _, err := repo.Resolve(ctx, "../tags"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a tag that is a path: %v", err)
	}
	remove := reg.Fault("/manifests/", 0, registrytest.Corrupt(20))
	if _, err := repo.Manifest(ctx, img.Desc); !errdefs.IsDataLoss(err) {
		t.Errorf("corrupt manifest by digest: %v", err)
	}
	if _, _, err := repo.GetManifest(ctx, "v1"); !errdefs.IsDataLoss(err) {
		t.Errorf("corrupt manifest by tag: %v", err)
	}
	remove()
	wrong := img.Desc
	wrong.Size--
	if _, err := repo.Manifest(ctx, wrong); !errdefs.IsDataLoss(err) {
		t.Errorf("manifest of another size: %v", err)
	}
	wrong.Size = registry.MaxManifest + 1
	if _, err := repo.Manifest(ctx, wrong); !errdefs.IsInvalidArgument(err) {
		t.Errorf("manifest too large to ask for: %v", err)
	}
	reg.PushManifest("library/x", "large", ocispec.MediaTypeImageManifest, make([]byte, registry.MaxManifest+1))
	if _, _, err := repo.GetManifest(ctx, "large"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("manifest that is too large: %v", err)
	}
	reg.Fault("/blobs/", 0, registrytest.Corrupt(3))
	if _, err := repo.Blob(ctx, img.Config); !errdefs.IsDataLoss(err) {
		t.Errorf("corrupt blob: %v", err)
	}
	if _, err := repo.Blob(ctx, ocispec.Descriptor{Digest: img.Config.Digest, Size: registry.MaxBlob + 1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("blob too large for memory: %v", err)
	}
}

// TestTransientManifest has the first answers fail.
func TestTransientManifest(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	img := reg.PushImage("library/x", "v1", registrytest.Image{})
	repo := repository(t, newClient(t, fast()), reg)
	for _, effect := range []registrytest.Effect{registrytest.Status(503), registrytest.Truncate(10)} {
		reg.Fault("/manifests/", 2, effect)
		if _, err := repo.Manifest(t.Context(), img.Desc); err != nil {
			t.Error(err)
		}
	}
}

// TestOtherMediaType serves a manifest as plain JSON: its own field counts.
func TestOtherMediaType(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	img := reg.PushImage("library/y", "", registrytest.Image{})
	reg.PushManifest("library/x", "v1", "text/plain; charset=utf-8", img.Manifest)
	desc, err := repository(t, newClient(t, fast()), reg).Resolve(t.Context(), "v1")
	if err != nil || desc.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("media type %q, %v", desc.MediaType, err)
	}
}

// TestWithoutHead resolves at a registry that does not know HEAD.
func TestWithoutHead(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Redirect: true})
	img := reg.PushImage("library/x", "v1", registrytest.Image{})
	reg.FaultFunc(func(r *http.Request) bool { return r.Method == http.MethodHead }, 0, registrytest.Status(405))
	cfg := fast()
	cfg.UserAgent = "test/1"
	repo := repository(t, newClient(t, cfg), reg)
	desc, err := repo.Resolve(t.Context(), "v1")
	if err != nil || desc.Digest != img.Desc.Digest {
		t.Errorf("resolved to %s: %v", desc.Digest, err)
	}
	for range 2 { // by the registry, and directly
		if _, err := repo.Blob(t.Context(), img.Config); err != nil {
			t.Error(err)
		}
	}
	for _, r := range reg.Requests("") {
		if r.UserAgent != "test/1" {
			t.Errorf("%s came from %q", r.Path, r.UserAgent)
		}
	}
}

func TestUnreachable(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	name, err := reference.ParseNormalizedNamed(host + "/library/x")
	if err != nil {
		t.Fatal(err)
	}
	_, err = newClient(t, fast()).Repository(name).Resolve(t.Context(), "latest")
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "is the registry reachable") || !strings.Contains(err.Error(), host) {
		t.Errorf("error %v", err)
	}
}

// TestSchemes speaks HTTPS to a plain server and the other way round, and
// HTTPS without knowing the server's authority.
func TestSchemes(t *testing.T) {
	plain := registrytest.Start(t, registrytest.Options{})
	secure := registrytest.Start(t, registrytest.Options{TLS: true})
	https := fast()
	https.PlainHTTP = func(string) bool { return false }
	for _, tc := range []struct {
		name string
		reg  *registrytest.Server
		cfg  registry.Config
		text string
	}{
		{"HTTPS to HTTP", plain, https, "speaks plain HTTP, not HTTPS: set plain_http = [\"" + plain.Host() + "\"]"},
		{"HTTP to HTTPS", secure, fast(), "take it out of plain_http"},
		{"unknown authority", secure, https, "add the authority"},
	} {
		_, _, err := repository(t, newClient(t, tc.cfg), tc.reg).GetManifest(t.Context(), "latest")
		if err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	if n := len(plain.Requests("")); n != 0 {
		t.Errorf("%d requests reached the plain server", n)
	}
}

// TestCancel ends a context in each phase of a request.
func TestCancel(t *testing.T) {
	for _, tc := range []struct {
		name   string
		effect registrytest.Effect
	}{
		{"before the header", registrytest.Delay(registrytest.Forever)},
		{"in the body", registrytest.Stall(100, registrytest.Forever)},
		{"before a retry", registrytest.Status(503, "Retry-After", "25")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			noLeak(t)
			reg := registrytest.Start(t, registrytest.Options{})
			desc := reg.PushBlob("library/x", "", random(100_000))
			reg.Fault("/blobs/", 0, tc.effect)
			cfg := fast()
			cfg.Stall = time.Hour
			repo := repository(t, newClient(t, cfg), reg)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				for len(reg.Requests("/blobs/")) == 0 {
					time.Sleep(time.Millisecond)
				}
				cancel()
			}()
			rc, err := repo.Range(ctx, desc.Digest, 0, 50_000)
			if _, err := readAll(t, rc, err); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
		})
	}
}
