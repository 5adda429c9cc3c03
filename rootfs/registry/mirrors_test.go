package registry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/hosts"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// mirrors is a client that finds mirrors of registries in a tree.
type mirrors struct {
	dir    string
	log    bytes.Buffer
	client *registry.Client
}

// withMirrors returns a client for which origin's hosts.toml has this text.
func withMirrors(t *testing.T, cfg registry.Config, origin *registrytest.Server, text string) *mirrors {
	t.Helper()
	m := &mirrors{dir: t.TempDir()}
	m.write(t, origin, text)
	m.client = newClient(t, m.config(cfg))
	return m
}

func (m *mirrors) config(cfg registry.Config) registry.Config {
	cfg.Log = slog.New(slog.NewTextHandler(&m.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.Hosts = hosts.New([]string{m.dir}, hosts.Options{Log: cfg.Log}).Hosts
	return cfg
}

func parse(t *testing.T, name string) reference.Named {
	t.Helper()
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (m *mirrors) write(t *testing.T, origin *registrytest.Server, text string) {
	t.Helper()
	dir := filepath.Join(m.dir, strings.Replace(origin.Host(), ":", "_", 1)+"_")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func hostTable(reg *registrytest.Server, settings string) string {
	return fmt.Sprintf("[host.\"http://%s\"]\n%s\n", reg.Host(), settings)
}

// pair is a registry and a mirror with the same blob.
type pair struct {
	origin, mirror *registrytest.Server
	data           []byte
	desc           ocispec.Descriptor
}

func newPair(t *testing.T, mirror registrytest.Options) *pair {
	t.Helper()
	p := &pair{origin: registrytest.Start(t, registrytest.Options{}), mirror: registrytest.Start(t, mirror), data: random(3 << 20)}
	p.desc = p.origin.PushBlob("library/x", "", p.data)
	p.mirror.PushBlob("library/x", "", p.data)
	return p
}

// read reads a range and compares it.
func (p *pair) read(t *testing.T, repo *registry.Repository, off, n int64) {
	t.Helper()
	rc, err := repo.Range(t.Context(), p.desc.Digest, off, n)
	if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, p.data[off:off+n]) {
		t.Fatalf("range of %d at %d: %v, %d bytes", n, off, err, len(got))
	}
}

// asked is how many requests a registry got for blobs.
func asked(reg *registrytest.Server) int { return len(reg.Requests("/blobs/")) }

// TestMirrorCapabilities sends each kind of request to who is trusted with it.
func TestMirrorCapabilities(t *testing.T) {
	for _, tc := range []struct {
		name, settings                  string
		tags, digests, blobs, referrers bool // served by the mirror
	}{
		{"all", "", true, true, true, true},
		{"public mirror", `capabilities = ["pull"]`, false, true, true, false},
		{"private mirror", `capabilities = ["pull", "resolve"]`, true, true, true, false},
		{"referrers", `capabilities = ["pull", "referrers"]`, false, true, true, true},
		{"push only", `capabilities = ["push"]`, false, false, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			origin, mirror := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
			layer := registrytest.Layer{Blob: random(1000), MediaType: "application/x"}
			img := origin.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
			mirror.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
			m := withMirrors(t, fast(), origin, hostTable(mirror, tc.settings))
			repo := repository(t, m.client, origin)
			for _, reg := range []*registrytest.Server{origin, mirror} {
				reg.PushReferrer("library/x", img.Desc, wanted)
				reg.Reset()
			}
			served := func(what string, byMirror bool, err error) {
				t.Helper()
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				want, other := mirror, origin
				if !byMirror {
					want, other = origin, mirror
				}
				if len(want.Requests("/v2/")) == 0 || len(other.Requests("/v2/")) != 0 {
					t.Errorf("%s: the registry was asked %d times, the mirror %d times", what, len(origin.Requests("/v2/")), len(mirror.Requests("/v2/")))
				}
				for _, r := range mirror.Requests("/v2/") {
					if r.Query != "ns="+strings.Replace(origin.Host(), ":", "%3A", 1) && !strings.Contains(r.Path, "/referrers/") {
						t.Errorf("%s: the mirror was asked with %q", what, r.Query)
					}
				}
				for _, r := range origin.Requests("/v2/") {
					if strings.Contains(r.Query, "ns=") {
						t.Errorf("%s: the registry was asked with %q", what, r.Query)
					}
				}
				origin.Reset()
				mirror.Reset()
			}
			ctx := t.Context()
			_, err := repo.Resolve(ctx, "v1")
			served("resolve", tc.tags, err)
			_, _, err = repo.GetManifest(ctx, "v1")
			served("manifest of a tag", tc.tags, err)
			_, err = repo.Manifest(ctx, img.Desc)
			served("manifest", tc.digests, err)
			_, err = repo.Blob(ctx, img.Config)
			served("blob", tc.blobs, err)
			rc, err := repo.Open(ctx, img.Layers[0])
			_, err = readAll(t, rc, err)
			served("open", tc.blobs, err)
			list, err := repo.Referrers(ctx, img.Desc.Digest, wanted)
			if len(list) != 1 {
				t.Errorf("%d referrers", len(list))
			}
			served("referrers", tc.referrers, err)
		})
	}
}

// TestMirrorFails lets a mirror fail in all ways: the registry serves, and the
// mirror is left alone for a while when it is the mirror that failed.
func TestMirrorFails(t *testing.T) {
	for _, tc := range []struct {
		name    string
		effect  registrytest.Effect
		remains bool // it is asked for the next thing
	}{
		{"400", registrytest.Status(400), true},
		{"401", registrytest.Status(401), false},
		{"403", registrytest.Status(403), false},
		{"404", registrytest.Status(404), true},
		{"416", registrytest.Status(416), true},
		{"418", registrytest.Status(418), false},
		{"429", registrytest.Status(429), false},
		{"429 for an hour", registrytest.Status(429, "Retry-After", "3600"), false},
		{"500", registrytest.Status(500), false},
		{"503", registrytest.Status(503, "Retry-After", "1"), false},
		{"no body", registrytest.Truncate(0), false},
		{"no header", registrytest.Delay(registrytest.Forever), false},
		{"other range", registrytest.ShiftRange(1), true},
		{"endless redirects", registrytest.Status(307, "Location", "/v2/library/x/blobs/x"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, registrytest.Options{})
			p.mirror.PushBlobAs("library/x", "x", nil)
			p.mirror.Fault("/blobs/", 0, tc.effect)
			cfg := fast()
			if tc.name == "no header" {
				cfg.Stall = 200 * time.Millisecond
			}
			m := withMirrors(t, cfg, p.origin, hostTable(p.mirror, ""))
			repo := repository(t, m.client, p.origin)
			p.read(t, repo, 1000, 5000)
			first := asked(p.mirror)
			if first == 0 || first > 12 || asked(p.origin) != 1 {
				t.Errorf("the mirror was asked %d times, the registry %d times", first, asked(p.origin))
			}
			p.read(t, repo, 6000, 5000)
			if again := asked(p.mirror) > first; again != tc.remains {
				t.Errorf("the mirror is asked again: %v", again)
			}
			if n := strings.Count(m.log.String(), "a mirror fails") + strings.Count(m.log.String(), "wants other credentials"); n == 1 == tc.remains {
				t.Errorf("%d warnings: %s", n, &m.log)
			}
			if s := m.client.Stats(); s.Retries != 0 {
				t.Errorf("%d retries", s.Retries)
			}
		})
	}
}

// TestMirrorGone has a mirror that nothing listens for, and all hosts gone.
func TestMirrorGone(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	gone := freePort(t)
	cfg := fast()
	cfg.RetryMax = 1
	m := withMirrors(t, cfg, p.origin, fmt.Sprintf("[host.\"http://%s\"]\n%s", gone, hostTable(p.mirror, "dial_timeout = \"1s\"")))
	repo := repository(t, m.client, p.origin)
	p.read(t, repo, 0, 1000)
	if asked(p.mirror) != 1 || asked(p.origin) != 0 {
		t.Errorf("the second mirror was asked %d times, the registry %d times", asked(p.mirror), asked(p.origin))
	}
	p.mirror.Close()
	p.origin.Close()
	_, err := repo.Range(t.Context(), p.desc.Digest, 0, 10)
	if !errdefs.IsUnavailable(err) {
		t.Fatalf("error %v", err)
	}
	// The first one is known to be down, the second one has just been asked.
	for _, part := range []string{"at registry " + p.origin.Host(), "before that: ", "at registry " + p.mirror.Host()} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q lacks %q", err, part)
		}
	}
}

// TestMirrorHangs: a caller with little time waits for a mirror once.
func TestMirrorHangs(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	p.mirror.Fault("/blobs/", 0, registrytest.Delay(registrytest.Forever))
	m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, ""))
	repo := repository(t, m.client, p.origin)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := repo.Range(ctx, p.desc.Digest, 0, 10); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	p.read(t, repo, 0, 1000)
	if asked(p.mirror) != 1 {
		t.Errorf("the mirror was asked %d times", asked(p.mirror))
	}
}

// TestMirrorErrors: the registry's own word is the one that counts.
func TestMirrorErrors(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	p.mirror.Fault("", 0, registrytest.Status(500))
	m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, ""))
	_, err := repository(t, m.client, p.origin).Blob(t.Context(), describe([]byte("absent")))
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), p.mirror.Host()) {
		t.Errorf("error %v", err)
	}
	other := withMirrors(t, fast(), p.origin, "server = \"http://"+p.origin.Host()+"\"\ncapabilities = [\"push\"]\n")
	_, err = repository(t, other.client, p.origin).Resolve(t.Context(), "v1")
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "capabilities") {
		t.Errorf("no host: %v", err)
	}
}

// TestMirrorLostInTheMiddle goes on at the next host at the same offset.
func TestMirrorLostInTheMiddle(t *testing.T) {
	const off, n = 1_000_000, 1_500_000
	for _, tc := range []struct {
		name   string
		effect registrytest.Effect
		at     int64
	}{
		{"short body", registrytest.Truncate(700_000), 700_000},
		{"stall", registrytest.Stall(500_000, registrytest.Forever), 500_000},
		{"nothing", registrytest.Truncate(0), 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, registrytest.Options{})
			p.mirror.Fault("/blobs/", 0, tc.effect)
			cfg := fast()
			if tc.name == "stall" {
				cfg.Stall = 300 * time.Millisecond
			}
			m := withMirrors(t, cfg, p.origin, hostTable(p.mirror, ""))
			p.read(t, repository(t, m.client, p.origin), off, n)
			if asked(p.mirror) != 1 || asked(p.origin) != 1 {
				t.Fatalf("the mirror was asked %d times, the registry %d times", asked(p.mirror), asked(p.origin))
			}
			want := fmt.Sprintf("bytes=%d-%d", off+tc.at, off+n-1)
			if got := p.origin.Requests("/blobs/")[0].Range; got != want {
				t.Errorf("the registry was asked for %s, want %s", got, want)
			}
		})
	}
}

// TestMirrorWrongBlob: what is verified here is asked of the next host.
func TestMirrorWrongBlob(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	p.mirror.Fault("/blobs/", 0, registrytest.Corrupt(5))
	m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, ""))
	got, err := repository(t, m.client, p.origin).Blob(t.Context(), p.desc)
	if err != nil || !bytes.Equal(got, p.data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestMirrorStream reads a whole blob in parallel ranges from a mirror that is
// lost on the way.
func TestMirrorStream(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	p.mirror.Fault("/blobs/", 1, registrytest.Truncate(30_000))
	m := withMirrors(t, small(), p.origin, hostTable(p.mirror, ""))
	rc, err := repository(t, m.client, p.origin).Open(t.Context(), p.desc)
	if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, p.data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if p.mirror.BlobStats(p.desc.Digest).Bytes == 0 || p.origin.BlobStats(p.desc.Digest).Bytes == 0 {
		t.Error("one of the hosts was not read from")
	}
}

// TestMirrorPush: only a host that takes pushes gets one, and all of it.
func TestMirrorPush(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	for _, tc := range []struct {
		settings string
		to       *registrytest.Server
	}{
		{`capabilities = ["pull", "resolve", "referrers"]`, p.origin},
		{`capabilities = ["push"]`, p.mirror},
	} {
		m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, tc.settings))
		repo := repository(t, m.client, p.origin)
		p.origin.Reset()
		p.mirror.Reset()
		blob := random(1000 + len(tc.settings))
		if has, err := repo.Has(t.Context(), describe(blob)); err != nil || has {
			t.Errorf("has: %v, %v", has, err)
		}
		if err := repo.PushBlob(t.Context(), describe(blob), bytes.NewReader(blob)); err != nil {
			t.Fatal(err)
		}
		manifest := fmt.Appendf(nil, `{"schemaVersion":2,"config":{"mediaType":"x/y","digest":%q,"size":%d},"layers":[]}`, digest.FromBytes(blob), len(blob))
		if _, err := repo.PushManifest(t.Context(), ocispec.MediaTypeImageManifest, manifest, "v2"); err != nil {
			t.Fatal(err)
		}
		other := p.origin
		if tc.to == p.origin {
			other = p.mirror
		}
		if len(tc.to.Requests("/v2/")) < 3 || len(other.Requests("/v2/")) != 0 {
			t.Errorf("%s: the registry was asked %d times, the mirror %d times", tc.settings, len(p.origin.Requests("/v2/")), len(p.mirror.Requests("/v2/")))
		}
	}
}

// TestMirrorsChange edits hosts.toml while the client is in use.
func TestMirrorsChange(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	m := withMirrors(t, fast(), p.origin, "")
	repo := repository(t, m.client, p.origin)
	p.read(t, repo, 0, 1000)
	if asked(p.mirror) != 0 {
		t.Error("a mirror that is not configured was asked")
	}
	m.write(t, p.origin, hostTable(p.mirror, ""))
	for deadline := time.Now().Add(20 * time.Second); asked(p.mirror) == 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the mirror is not found")
		}
		p.read(t, repo, 0, 1000)
	}
}

// TestMirrorSecrets has a mirror with a token in a header of its hosts.toml,
// which redirects to a storage, and a token service elsewhere.
func TestMirrorSecrets(t *testing.T) {
	const secret = "s3cr3t-header"
	p := newPair(t, registrytest.Options{Redirect: true, Auth: &registrytest.Auth{}})
	m := withMirrors(t, fast(), p.origin, hostTable(p.mirror, "[host.\"http://"+p.mirror.Host()+"\".header]\nx-token = \""+secret+"\""))
	seen := map[string]int{}
	look := func(where string) func(*http.Request) bool {
		return func(r *http.Request) bool {
			if r.Header.Get("X-Token") == secret {
				seen[where+strings.SplitN(r.URL.Path, "/", 3)[1]]++
			}
			return false
		}
	}
	p.mirror.FaultFunc(look("mirror "), 0)
	p.origin.FaultFunc(look("origin "), 0)
	repo := repository(t, m.client, p.origin)
	p.read(t, repo, 0, 1000)
	p.read(t, repo, 1000, 1000) // at the redirect target, which is known now
	_, err := repo.Resolve(t.Context(), "absent")
	if !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if seen["mirror storage"] != 0 || seen["origin v2"] != 0 || seen["mirror v2"] == 0 {
		t.Errorf("the header was seen %v", seen)
	}
	if strings.Contains(m.log.String(), secret) || strings.Contains(err.Error(), secret) {
		t.Errorf("a secret in the log: %s", &m.log)
	}
}
