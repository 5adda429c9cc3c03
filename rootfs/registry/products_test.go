package registry_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// product is an HTTP server that behaves as a product is documented to. None of
// them runs here: what is tested is our side of the documented behaviour.
type product struct {
	name string
	// auth is what the registry behind it wants; nil is nothing.
	auth *registrytest.Auth
	// table is its part of hosts.toml; %[1]s is its address, %[2]s the registry's.
	table string
	// serve answers with next, which is the registry's content.
	serve func(t *testing.T, origin *registrytest.Server, next http.Handler) http.Handler
	// pulled tells whether layers come from it the first and the second time.
	pulled [2]bool
}

var products = []product{{
	// dfdaemon as a mirror: it asks the registry that the header names, and hands
	// on Authorization and the challenge (d7y.io/docs, "containerd";
	// dragonflyoss/client dragonfly-client/src/proxy/header.rs).
	name: "Dragonfly, a header for each registry", auth: &registrytest.Auth{User: "user", Password: "secret"},
	table: "[host.\"http://%[1]s\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"http://%[1]s\".header]\n" +
		"X-Dragonfly-Registry = [\"http://%[2]s\"]\nX-Dragonfly-Tag = \"tatami\"\nX-Dragonfly-Priority = \"6\"\n",
	serve: func(t *testing.T, origin *registrytest.Server, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("X-Dragonfly-Registry") != "http://"+origin.Host() || r.Header.Get("X-Dragonfly-Priority") != "6" || r.Header.Get("X-Dragonfly-Tag") != "tatami" {
				http.Error(w, "another registry", http.StatusBadGateway)
				return
			}
			next.ServeHTTP(w, r)
		})
	},
	pulled: [2]bool{true, true},
}, {
	// Newer ones take the registry from "?ns=" (dragonflyoss/client issue 1791).
	name: "Dragonfly, for all registries", table: "[host.\"http://%[1]s\"]\n",
	serve: func(t *testing.T, origin *registrytest.Server, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("ns") != origin.Host() {
				http.Error(w, "another registry", http.StatusBadGateway)
				return
			}
			next.ServeHTTP(w, r)
		})
	},
	pulled: [2]bool{true, true},
}, {
	// A peer that has the content serves it, otherwise the answer is 404 and the
	// client goes to the next mirror (spegel-org/spegel issue 469); ranges since
	// pull request 1029.
	name: "Spegel without the image", table: "[host.\"http://%[1]s\"]\ncapabilities = [\"pull\", \"resolve\"]\ndial_timeout = \"200ms\"\n",
	serve: func(t *testing.T, _ *registrytest.Server, _ http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound) // no body
		})
	},
	pulled: [2]bool{false, false},
}, {
	// A peer was found and fails: 500 (same issue). The mirror is left alone.
	name: "Spegel with a bad peer", table: "[host.\"http://%[1]s\"]\n",
	serve: func(t *testing.T, _ *registrytest.Server, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/blobs/") {
				http.Error(w, "expected 200 but was 500", http.StatusInternalServerError)
				return
			}
			next.ServeHTTP(w, r)
		})
	},
	pulled: [2]bool{false, false},
}, {
	// A proxy project has its name in the path. It ignores Range until it has the
	// blob (goharbor/harbor issue 23875), and does not know upstream's referrers.
	name: "Harbor proxy cache", table: "[host.\"http://%[1]s/v2/proxy\"]\noverride_path = true\n",
	serve: func(t *testing.T, _ *registrytest.Server, next http.Handler) http.Handler {
		var asked atomic.Int64
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rest, ok := strings.CutPrefix(r.URL.Path, "/v2/proxy/")
			if !ok {
				http.Error(w, "no such project", http.StatusNotFound)
				return
			}
			r.URL.Path = "/v2/" + rest
			if strings.Contains(rest, "/referrers/") {
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				fmt.Fprint(w, `{"schemaVersion":2,"manifests":[]}`)
				return
			}
			if strings.Contains(rest, "/blobs/") && asked.Add(1) == 1 {
				r.Header.Del("Range")
			}
			next.ServeHTTP(w, r)
		})
	},
	pulled: [2]bool{false, false}, // the range is far in the blob: the registry has it cheaper
}, {
	// zot syncs an image when its manifest is asked for (zotregistry.dev,
	// "Mirroring", onDemand); a blob before that is not found.
	name: "zot, on demand", table: "[host.\"http://%[1]s\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
	serve: func(t *testing.T, _ *registrytest.Server, next http.Handler) http.Handler {
		var synced atomic.Bool
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/manifests/") {
				synced.Store(true)
			}
			if !synced.Load() {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			next.ServeHTTP(w, r)
		})
	},
	pulled: [2]bool{true, true},
}, {
	// Docker repositories below a path (help.sonatype.com, "Docker Registry",
	// path based routing), with no referrers API and with basic authentication
	// of its own; whoever has no login there gets 401 and goes on.
	name: "Nexus with a login of its own", table: "[host.\"http://%[1]s/repository/docker/v2\"]\n",
	serve: func(t *testing.T, _ *registrytest.Server, next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Basic realm="Sonatype Nexus Repository Manager"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
		})
	},
	pulled: [2]bool{false, false},
}}

func TestProducts(t *testing.T) {
	for _, p := range products {
		t.Run(p.name, func(t *testing.T) {
			origin := registrytest.Start(t, registrytest.Options{Auth: p.auth})
			layer := registrytest.Layer{Blob: random(4 << 20), MediaType: "application/x"}
			img := origin.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
			origin.PushReferrer("library/x", img.Desc, wanted)
			var pulled atomic.Int64
			next := forward(t, origin.Host(), func(r *http.Request) {
				if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") != "" && (p.auth == nil || r.Header.Get("Authorization") != "") {
					pulled.Add(1)
				}
			})
			server := httptest.NewServer(p.serve(t, origin, next))
			defer server.Close()
			cfg := fast()
			cfg.RetryMax = 1
			cfg.Credentials = auth.StaticCredential(origin.Host(), auth.Credential{Username: "user", Password: "secret"})
			m := withMirrors(t, cfg, origin, fmt.Sprintf(p.table, strings.TrimPrefix(server.URL, "http://"), origin.Host()))
			repo := repository(t, m.client, origin)
			desc, data, err := repo.GetManifest(t.Context(), "v1")
			if err != nil || desc.Digest != img.Desc.Digest || !bytes.Equal(data, img.Manifest) {
				t.Fatalf("manifest: %v", err)
			}
			for i, want := range p.pulled {
				before := pulled.Load()
				rc, err := repo.Range(t.Context(), img.Layers[0].Digest, 3<<20, 5000)
				if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, layer.Blob[3<<20:3<<20+5000]) {
					t.Fatalf("range: %v", err)
				}
				if got := pulled.Load() > before; got != want {
					t.Errorf("range %d came from the mirror: %v\n%s", i, got, &m.log)
				}
			}
			if got, err := repo.Blob(t.Context(), img.Layers[0]); err != nil || !bytes.Equal(got, layer.Blob) {
				t.Errorf("blob: %v", err)
			}
			if list, err := repo.Referrers(t.Context(), img.Desc.Digest, wanted); err != nil || len(list) != 1 {
				t.Errorf("referrers: %d, %v", len(list), err)
			}
			if !repo.Ranged() {
				t.Error("ranges are taken for impossible")
			}
		})
	}
}

// TestCredentialsOfMirrors: a mirror on another machine does not get what
// belongs to the registry, whatever it asks for.
func TestCredentialsOfMirrors(t *testing.T) {
	p := newPair(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "secret", Basic: true}})
	var got []string
	cfg := fast()
	cfg.RetryMax = -1
	cfg.Credentials = func(_ context.Context, host string) (auth.Credential, error) {
		got = append(got, host)
		return auth.EmptyCredential, nil
	}
	t.Setenv("HTTP_PROXY", "http://"+p.mirror.Host()) // stands for the other machine
	m := withMirrors(t, cfg, p.origin, "[host.\"http://mirror.test:80\"]\n"+hostTable(p.mirror, ""))
	p.read(t, repository(t, m.client, p.origin), 0, 1000)
	if want := "mirror.test:80," + p.mirror.Host() + "," + p.origin.Host(); strings.Join(got, ",") != want {
		t.Errorf("credentials were looked up for %v, want %s", got, want)
	}
}

// TestPullThrough has Debian's docker-registry as a pull-through mirror of
// another one: the mirror fetches from the registry what it is asked for.
func TestPullThrough(t *testing.T) {
	origin := startDistribution(t)
	layer := random(3_000_000)
	layerDesc := upload(t, origin, "application/vnd.oci.image.layer.v1.tar", layer)
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: upload(t, origin, ocispec.MediaTypeImageConfig, []byte(`{}`)), Layers: []ocispec.Descriptor{layerDesc},
	}
	desc := uploadManifest(t, origin, "v1", manifest.MediaType, manifest)
	mirror := startDistributionWith(t, "proxy: {remoteurl: \"http://"+origin+"\"}\n")
	dir := t.TempDir()
	m := &mirrors{dir: dir}
	sub := filepath.Join(dir, strings.Replace(origin, ":", "_", 1)+"_")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sub, "hosts.toml"), fmt.Appendf(nil, "server = \"http://%s\"\n[host.\"http://%s\"]\n", freePort(t), mirror), 0o600); err != nil {
		t.Fatal(err)
	}
	m.client = newClient(t, m.config(small()))
	repo := m.client.Repository(parse(t, origin+"/library/x"))
	got, err := repo.Resolve(t.Context(), "v1")
	if err != nil || got.Digest != desc.Digest {
		t.Fatalf("resolved %s: %v", got.Digest, err)
	}
	for range 2 { // cold and warm
		rc, err := repo.Range(t.Context(), layerDesc.Digest, 1_000_001, 65_536)
		if data, err := readAll(t, rc, err); err != nil || !bytes.Equal(data, layer[1_000_001:1_000_001+65_536]) {
			t.Fatalf("range: %v, %d bytes", err, len(data))
		}
	}
	if data, err := repo.Blob(t.Context(), layerDesc); err != nil || !bytes.Equal(data, layer) {
		t.Errorf("blob: %v, %d bytes", err, len(data))
	}
}

// TestPullThroughCold has the same mirror before it has a blob: it ignores Range
// then, as Harbor does, and fetches the blob. The registry, which wants tokens
// that only the mirror's settings have, is asked meanwhile where that is cheaper.
func TestPullThroughCold(t *testing.T) {
	origin := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "secret"}})
	blob := random(6 << 20)
	img := origin.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{{Blob: blob, MediaType: ocispec.MediaTypeImageLayer}}})
	next := forward(t, origin.Host(), nil)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Www-Authenticate", fmt.Sprintf("Bearer realm=\"http://%s/token\",service=\"registrytest\"", origin.Host()))
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer front.Close()
	mirror := startDistributionWith(t, fmt.Sprintf("proxy: {remoteurl: %q, username: user, password: secret}\n", front.URL))
	table := fmt.Sprintf("[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", mirror)
	cfg := fast()
	cfg.RetryMax = -1
	withLogin := cfg
	withLogin.Credentials = auth.StaticCredential(origin.Host(), auth.Credential{Username: "user", Password: "secret"})
	layer := img.Layers[0]
	read := func(cfg registry.Config, off int64) *mirrors {
		t.Helper()
		m := withMirrors(t, cfg, origin, table)
		repo := repository(t, m.client, origin)
		if desc, err := repo.Resolve(t.Context(), "v1"); err != nil || desc.Digest != img.Desc.Digest {
			t.Fatalf("resolved %s: %v", desc.Digest, err)
		}
		rc, err := repo.Range(t.Context(), layer.Digest, off, 5000)
		if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, blob[off:off+5000]) {
			t.Fatalf("range at %d: %v, %d bytes\n%s", off, err, len(got), &m.log)
		}
		return m
	}
	if m := read(withLogin, 5<<20); !strings.Contains(m.log.String(), "ignores Range headers") {
		t.Errorf("the mirror was not cold:\n%s", &m.log)
	}
	if n := len(ranges(origin)); n != 1 {
		t.Errorf("the registry was asked for %d ranges, want 1", n)
	}
	read(withLogin, 1000) // near the start: skipped
	if n := len(ranges(origin)); n != 1 {
		t.Errorf("the registry was asked for %d ranges, want 1", n)
	}
	waitPartial(t, "http://"+mirror+"/v2/library/x/blobs/"+layer.Digest.String())
	origin.Reset()
	read(cfg, 5<<20) // without credentials
	if n := origin.BlobStats(layer.Digest).Bytes; n != 0 {
		t.Errorf("the registry sent %d bytes of what the mirror has", n)
	}
	origin.Close()
	read(cfg, 2<<20) // the tag, too
}

// ranges are the requests with a token for parts of blobs.
func ranges(reg *registrytest.Server) (list []registrytest.Request) {
	for _, r := range reg.Requests("/blobs/") {
		if r.Range != "" && r.Authorization != "" {
			list = append(list, r)
		}
	}
	return list
}

// waitPartial waits until a server has ranges of what address names.
func waitPartial(t *testing.T, address string) {
	t.Helper()
	for range 200 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Range", "bytes=1-2")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close() // its status is what counts
		if resp.StatusCode == http.StatusPartialContent {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("%s has no ranges", address)
}
