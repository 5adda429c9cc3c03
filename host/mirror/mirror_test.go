package mirror

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/host/blobs"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// rig is a mirror, and a registry that it has the domain "registry.test" for.
type rig struct {
	*Mirror
	reg  *registrytest.Server
	addr string
}

const domain = "registry.test"

func newRig(t *testing.T, opts registrytest.Options) *rig {
	t.Helper()
	g := &rig{reg: registrytest.Start(t, opts)}
	host := &registry.Host{Name: g.reg.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanAll}
	client := registry.New(registry.Config{
		RetryMax: -1, Stall: 5 * time.Second,
		Hosts: func(name string) []*registry.Host {
			if registry.Loopback(name) {
				return nil // as it is called
			}
			return []*registry.Host{host}
		},
	})
	cache, err := blobs.Open(blobs.Config{Dir: t.TempDir(), Size: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	g.Mirror = New(Config{Registry: client, Blobs: cache})
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.addr = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Shutdown(t.Context())
		if err := <-done; err != nil {
			t.Error(err)
		}
		_, _ = cache.Close(), client.Close() // never fail
	})
	return g
}

// caller is a program of the node with this login; "" has none.
func (g *rig) caller(t *testing.T, user string) func(repo string) *registry.Repository {
	t.Helper()
	cfg := registry.Config{RetryMax: -1, Stall: 5 * time.Second, Chunk: 4 << 20}
	if user != "" {
		cfg.Credentials = auth.StaticCredential(g.addr, auth.Credential{Username: user, Password: "p"})
	}
	client := registry.New(cfg)
	t.Cleanup(func() { _ = client.Close() }) // never fails
	return func(repo string) *registry.Repository {
		named, err := reference.ParseNormalizedNamed(domain + "/" + repo)
		if err != nil {
			t.Fatal(err)
		}
		return client.Mirror(g.addr, named)
	}
}

func (g *rig) get(t *testing.T, method, path, authorization string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+g.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

func random(seed byte, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p) // never fails
	return p
}

// image pushes an image of one layer that does not compress. Its size is for more than
// one range of a caller.
func (g *rig) image(repo, tag string, seed byte) registrytest.Pushed {
	return g.imageOf(repo, tag, seed, 4<<20+100)
}

func (g *rig) imageOf(repo, tag string, seed byte, size int) registrytest.Pushed {
	return g.reg.PushImage(repo, tag, registrytest.Image{Layers: []registrytest.Layer{
		{MediaType: ocispec.MediaTypeImageLayerGzip, Blob: random(seed, size), DiffID: digest.FromString("x")},
	}})
}

// pull reads an image by its tag, as a container runtime does.
func pull(ctx context.Context, repo *registry.Repository, tag string) error {
	desc, err := repo.Resolve(ctx, tag)
	if err != nil {
		return err
	}
	data, err := repo.Manifest(ctx, desc)
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return err
	}
	for _, d := range append(m.Layers, m.Config) {
		if _, err := repo.Blob(ctx, d); err != nil {
			return err
		}
	}
	return nil
}

func TestPull(t *testing.T) {
	for name, opts := range map[string]registrytest.Options{
		"plain": {}, "redirects": {Redirect: true}, "no digest header": {NoDigest: true}, "login": {Auth: &registrytest.Auth{User: "u", Password: "p"}},
		"anonymous tokens": {Auth: &registrytest.Auth{}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t, opts)
			img := g.image("library/app", "v1", 1)
			user := ""
			if opts.Auth != nil {
				user = opts.Auth.User
			}
			for range 3 {
				if err := pull(t.Context(), g.caller(t, user)("library/app"), "v1"); err != nil {
					t.Fatal(err)
				}
			}
			for _, d := range append(img.Layers, img.Config) {
				if got := g.reg.BlobStats(d.Digest).Bytes; got != d.Size {
					t.Errorf("three pulls took %d bytes of a blob of %d from the registry", got, d.Size)
				}
			}
			gets := 0
			for _, r := range g.reg.Requests("/manifests/") {
				if r.Method == "GET" {
					gets++
				}
			}
			if gets != 1 && !opts.NoDigest && opts.Auth == nil {
				t.Errorf("%d GETs of manifests, which registries count", gets)
			}
		})
	}
}

// What is cached is no way around a login.
func TestRights(t *testing.T) {
	g := newRig(t, registrytest.Options{Auth: &registrytest.Auth{User: "u", Password: "p"}})
	img := g.imageOf("team/private", "v1", 1, 1<<20)
	other := g.imageOf("team/other", "v1", 2, 1<<20)
	layer, path := img.Layers[0], "/v2/team/private/blobs/"+img.Layers[0].Digest.String()+"?ns="+domain
	repo := g.caller(t, "u")("team/private")
	if err := pull(t.Context(), repo, "v1"); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"", "Bearer token-99", "Basic dTpw"} {
		for _, kind := range []string{path, "/v2/team/private/manifests/v1?ns=" + domain, "/v2/team/private/manifests/" + img.Desc.Digest.String() + "?ns=" + domain,
			"/v2/team/private/referrers/" + img.Desc.Digest.String() + "?ns=" + domain} {
			resp, body := g.get(t, "GET", kind, a)
			challenge := resp.Header.Get("WWW-Authenticate")
			if resp.StatusCode != 401 || !strings.Contains(challenge, g.reg.Host()+"/token") || !strings.Contains(string(body), "UNAUTHORIZED") {
				t.Errorf("%s with %q: %s, challenge %q, %.80s", kind, a, resp.Status, challenge, body)
			}
		}
	}
	if err := pull(t.Context(), g.caller(t, "x")("team/private"), "v1"); err == nil {
		t.Error("a wrong login pulls")
	}
	// A login for one repository opens no other, nor what only another has.
	if _, err := repo.Blob(t.Context(), other.Layers[0]); err == nil {
		t.Error("a blob of another repository is served")
	}
	if err := pull(t.Context(), g.caller(t, "u")("team/other"), "v1"); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Blob(t.Context(), other.Layers[0]); err == nil {
		t.Error("a cached blob of another repository is served")
	}
	if got := g.reg.BlobStats(layer.Digest).Bytes; got != layer.Size {
		t.Errorf("%d bytes of the layer were sent", got)
	}
}

// A token opens the repository that it was shown to open, also where another caller has
// made known what the next one has.
func TestRepositoriesApart(t *testing.T) {
	g := newRig(t, registrytest.Options{})
	one, two := g.imageOf("team/one", "v1", 1, 1<<20), g.imageOf("team/two", "v1", 2, 1<<20)
	g.reg.FaultFunc(func(req *http.Request) bool {
		return strings.Contains(req.URL.Path, "/team/two/") != (req.Header.Get("Authorization") == "Bearer two")
	}, 0, registrytest.Status(401))
	for _, tc := range []struct {
		repo, token string
		img         registrytest.Pushed
		status      int
	}{{"one", "one", one, 200}, {"two", "two", two, 200}, {"two", "one", two, 401}, {"one", "two", one, 401}} {
		path := "/v2/team/" + tc.repo + "/blobs/" + tc.img.Layers[0].Digest.String() + "?ns=" + domain
		if resp, _ := g.get(t, "GET", path, "Bearer "+tc.token); resp.StatusCode != tc.status {
			t.Errorf("%s with the token of %s: %s", tc.repo, tc.token, resp.Status)
		}
	}
}

// A request with two logins is nobody's.
func TestTwoLogins(t *testing.T) {
	g := newRig(t, registrytest.Options{})
	g.imageOf("app", "v1", 1, 1<<20)
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+g.addr+"/v2/app/manifests/v1?ns="+domain, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header["Authorization"] = []string{"Bearer a", "Bearer b"}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 400 || len(g.reg.Requests("/v2/")) != 0 {
		t.Errorf("%s, %d requests to the registry", resp.Status, len(g.reg.Requests("/v2/")))
	}
}

// A registry that sends who has no login to a page where people log in does not open its
// repositories by that, nor change what is known of them.
func TestLoginPage(t *testing.T) {
	g := newRig(t, registrytest.Options{})
	img := g.imageOf("team/private", "v1", 1, 1<<20)
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>who are you?</html>") // nobody to tell
	}))
	defer page.Close()
	g.reg.FaultFunc(func(req *http.Request) bool { return req.Header.Get("Authorization") == "" }, 0, registrytest.Status(302, "Location", page.URL))
	path := func(kind string, d digest.Digest) string {
		return "/v2/team/private/" + kind + "/" + d.String() + "?ns=" + domain
	}
	// read tells whether the layer and the manifest are served as they are.
	read := func(authorization string) (layer, manifest bool) {
		_, b := g.get(t, "GET", path("blobs", img.Layers[0].Digest), authorization)
		_, m := g.get(t, "GET", path("manifests", img.Desc.Digest), authorization)
		return digest.FromBytes(b) == img.Layers[0].Digest, digest.FromBytes(m) == img.Desc.Digest
	}
	if layer, manifest := read("Bearer good"); !layer || !manifest {
		t.Fatalf("with a login: %v %v", layer, manifest)
	}
	g.get(t, "HEAD", path("blobs", img.Config.Digest), "")
	g.get(t, "HEAD", path("manifests", digest.FromString("none")), "")
	if layer, manifest := read(""); layer || manifest {
		t.Errorf("without a login: %v %v", layer, manifest)
	}
	if layer, manifest := read("Bearer good"); !layer || !manifest {
		t.Errorf("with a login, later: %v %v", layer, manifest)
	}
	if resp, body := g.get(t, "GET", path("blobs", img.Config.Digest), "Bearer good"); resp.StatusCode != 200 || digest.FromBytes(body) != img.Config.Digest {
		t.Errorf("the page is what is known of the configuration: %s, %d bytes", resp.Status, len(body))
	}
}

// Somebody's own registry, which says to have what he wants to read, gets it for nobody.
func TestForeignRegistry(t *testing.T) {
	g := newRig(t, registrytest.Options{Auth: &registrytest.Auth{User: "u", Password: "p"}})
	img := g.imageOf("team/private", "v1", 1, 1<<20)
	if err := pull(t.Context(), g.caller(t, "u")("team/private"), "v1"); err != nil {
		t.Fatal(err)
	}
	sizes := map[string]ocispec.Descriptor{"/v2/x/manifests/v1": img.Desc}
	for kind, d := range map[string]ocispec.Descriptor{"manifests": img.Desc, "blobs": img.Layers[0]} {
		sizes["/v2/x/"+kind+"/"+d.Digest.String()] = d
	}
	evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		d := sizes[req.URL.Path]
		if req.Method != http.MethodHead {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", d.MediaType)
		w.Header().Set("Content-Length", strconv.FormatInt(d.Size, 10))
		w.Header().Set("Docker-Content-Digest", d.Digest.String())
	}))
	defer evil.Close()
	for path := range sizes {
		if resp, body := g.get(t, "GET", path+"?ns="+evil.Listener.Addr().String(), ""); resp.StatusCode != 404 {
			t.Errorf("%s: %s, %d bytes", path, resp.Status, len(body))
		}
	}
}

// The registry gets the callers' Authorization header and no other; what it said is
// remembered, but not for long.
func TestRemembered(t *testing.T) {
	g := newRig(t, registrytest.Options{Auth: &registrytest.Auth{User: "u", Password: "p"}})
	img := g.imageOf("app", "v1", 1, 1<<20)
	now := time.Now()
	g.rights.now = func() time.Time { return now }
	repo := g.caller(t, "u")("app")
	if err := pull(t.Context(), repo, "v1"); err != nil {
		t.Fatal(err)
	}
	blob := "/v2/app/blobs/" + img.Config.Digest.String() + "?ns=" + domain
	heads := len(g.reg.Requests("/blobs/"))
	g.reg.ExpireTokens()
	for range 3 {
		if resp, _ := g.get(t, "GET", blob, "Bearer token-1"); resp.StatusCode != 200 {
			t.Fatalf("remembered: %s", resp.Status)
		}
	}
	if n := len(g.reg.Requests("/blobs/")) - heads; n != 0 {
		t.Errorf("%d more requests for what is remembered", n)
	}
	if resp, _ := g.get(t, "GET", "/v2/app/manifests/v1?ns="+domain, "Bearer token-1"); resp.StatusCode != 401 {
		t.Errorf("a tag with an old token: %s", resp.Status)
	}
	now = now.Add(remembered)
	if resp, _ := g.get(t, "GET", blob, "Bearer token-1"); resp.StatusCode != 401 {
		t.Errorf("after %s: %s", remembered, resp.Status)
	}
	for _, r := range g.reg.Requests("/v2/") {
		if r.Authorization != "" && !strings.HasPrefix(r.Authorization, "Bearer token-1") {
			t.Errorf("the registry got %q", r.Authorization)
		}
	}
}

// A token that ends while it is remembered is found out at the next download.
func TestExpired(t *testing.T) {
	g := newRig(t, registrytest.Options{Auth: &registrytest.Auth{User: "u", Password: "p"}})
	img := g.imageOf("app", "v1", 1, 1<<20)
	repo := g.caller(t, "u")("app")
	if _, err := repo.Resolve(t.Context(), "v1"); err != nil {
		t.Fatal(err)
	}
	layer := img.Layers[0].Digest.String()
	if resp, _ := g.get(t, "HEAD", "/v2/app/blobs/"+layer+"?ns="+domain, "Bearer token-1"); resp.StatusCode != 200 || resp.ContentLength != img.Layers[0].Size {
		t.Fatalf("HEAD: %s", resp.Status)
	}
	config := "/v2/app/blobs/" + img.Config.Digest.String() + "?ns=" + domain
	if resp, _ := g.get(t, "GET", config, "Bearer token-1"); resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	g.reg.ExpireTokens()
	resp, _ := g.get(t, "GET", "/v2/app/blobs/"+layer+"?ns="+domain, "Bearer token-1")
	if resp.StatusCode != 401 || resp.Header.Get("WWW-Authenticate") == "" || resp.Header.Get("ETag") != "" {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
	if resp, _ := g.get(t, "GET", config, "Bearer token-1"); resp.StatusCode != 401 {
		t.Errorf("what is cached, once the registry has refused the token: %s", resp.Status)
	}
	if data, err := repo.Blob(t.Context(), img.Layers[0]); err != nil || digest.FromBytes(data) != img.Layers[0].Digest {
		t.Errorf("the caller's client does not get a new token: %v", err)
	}
}

func TestReferrers(t *testing.T) {
	g := newRig(t, registrytest.Options{})
	img := g.imageOf("app", "v1", 1, 1<<20)
	ref := g.reg.PushReferrer("app", img.Desc, "a/b")
	g.reg.PushReferrer("app", img.Desc, "c/d")
	repo := g.caller(t, "")("app")
	list, err := repo.Referrers(t.Context(), img.Desc.Digest, "a/b")
	if err != nil || len(list) != 1 || list[0].Digest != ref.Digest {
		t.Errorf("%v, %v", list, err)
	}
	resp, body := g.get(t, "GET", "/v2/app/referrers/"+digest.FromString("no").String()+"?ns="+domain, "")
	if resp.StatusCode != 200 || !strings.Contains(string(body), `"manifests":[]`) {
		t.Errorf("of nothing: %s %s", resp.Status, body)
	}
}

func TestRefusals(t *testing.T) {
	g := newRig(t, registrytest.Options{})
	img := g.imageOf("app", "v1", 1, 1<<20)
	no := digest.FromString("no").String()
	for _, tc := range []struct {
		method, path string
		status       int
		code         string
	}{
		{"GET", "/v2/app/manifests/v2?ns=" + domain, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/app/manifests/" + no + "?ns=" + domain, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/app/blobs/" + no + "?ns=" + domain, 404, "BLOB_UNKNOWN"},
		{"GET", "/v2/other/manifests/v1?ns=" + domain, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/app/manifests/sha256:00?ns=" + domain, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/app/manifests/.v1?ns=" + domain, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/app/blobs/v1?ns=" + domain, 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/referrers/v1?ns=" + domain, 400, "DIGEST_INVALID"},
		{"GET", "/v2/app/segments/" + no + "?ns=" + domain, 404, "UNSUPPORTED"},
		{"GET", "/v2/app/manifests/v1", 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/v1?ns=nodots", 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/v1?ns=" + domain + "/x", 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/v1?ns=user@" + domain, 400, "NAME_INVALID"},
		{"GET", "/v2/app/manifests/v1?ns=" + domain + "%23", 400, "NAME_INVALID"},
		{"GET", "/v2/APP/manifests/v1?ns=" + domain, 400, "NAME_INVALID"},
		{"GET", "/v2/a/../app/manifests/v1?ns=" + domain, 400, "NAME_INVALID"},
		{"GET", "/v2/app@" + no + "/manifests/v1?ns=" + domain, 400, "NAME_INVALID"},
		{"GET", "/v2/app/tags/list?ns=" + domain, 404, "UNSUPPORTED"},
		{"GET", "/v2/_catalog", 404, "UNSUPPORTED"},
		{"PUT", "/v2/app/manifests/v1?ns=" + domain, 405, "UNSUPPORTED"},
		{"DELETE", "/v2/app/blobs/" + img.Config.Digest.String() + "?ns=" + domain, 405, "UNSUPPORTED"},
	} {
		resp, body := g.get(t, tc.method, tc.path, "")
		if resp.StatusCode != tc.status || !bytes.Contains(body, []byte(tc.code)) {
			t.Errorf("%s %s: %s %s, want %d %s", tc.method, tc.path, resp.Status, body, tc.status, tc.code)
		}
	}
	if n := g.reg.Total().Bytes; n > 4<<10 {
		t.Errorf("refusals took %d bytes from the registry", n)
	}
	// It does not ask itself, which could go on for long.
	_, port, _ := net.SplitHostPort(g.addr)
	for _, path := range []string{"/v2/app/manifests/v1?ns=" + g.addr, "/v2/localhost:" + port + "/quay.io/app/manifests/v1"} {
		if resp, body := g.get(t, "GET", path, ""); resp.StatusCode != 400 || !bytes.Contains(body, []byte("the mirror itself")) {
			t.Errorf("%s: %s %s", path, resp.Status, body)
		}
	}
	// A name with its domain needs no ?ns=.
	if resp, _ := g.get(t, "GET", "/v2/"+domain+"/app/manifests/v1", ""); resp.StatusCode != 200 {
		t.Errorf("name with domain: %s", resp.Status)
	}
}

// What the registry says when it cannot help reaches the caller, whose client asks
// the next host then.
func TestRegistryFails(t *testing.T) {
	g := newRig(t, registrytest.Options{})
	g.imageOf("app", "v1", 1, 1<<20)
	for status, want := range map[int]int{429: 429, 503: 502, 403: 403, 302: 502} {
		remove := g.reg.Fault("/manifests/", 0, registrytest.Status(status, "Retry-After", "1"))
		resp, _ := g.get(t, "GET", "/v2/app/manifests/v1?ns="+domain, "")
		if resp.StatusCode != want || status == 429 && resp.Header.Get("Retry-After") != "1" {
			t.Errorf("%d became %s %v", status, resp.Status, resp.Header)
		}
		remove()
	}
	g.reg.Close()
	if resp, body := g.get(t, "GET", "/v2/app/manifests/v1?ns="+domain, ""); resp.StatusCode != 503 || strings.Contains(string(body), g.reg.Host()) {
		t.Errorf("registry down: %s %s", resp.Status, body)
	}
}

// A storage that refuses what the registry signed says nothing of the caller's login.
func TestStorageRefuses(t *testing.T) {
	g := newRig(t, registrytest.Options{})
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", "Basic")
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer storage.Close()
	_, port, _ := net.SplitHostPort(storage.Listener.Addr().String())
	g.reg.Fault("/blobs/", 0, registrytest.Status(307, "Location", "http://localhost:"+port+"/x"))
	resp, _ := g.get(t, "GET", "/v2/app/blobs/"+digest.FromString("x").String()+"?ns="+domain, "Bearer x")
	if resp.StatusCode != http.StatusBadGateway {
		t.Errorf("%s, %v", resp.Status, resp.Header)
	}
}

func TestOthers(t *testing.T) {
	list := []*registry.Host{{Name: "127.0.0.1:5055"}, {Name: "localhost:5055"}, {Name: "[::1]:5055"}, {Name: "10.0.0.1:5055"}, {Name: "127.0.0.1:65001"}, {Name: "quay.io"}}
	var got []string
	for _, h := range Others("127.0.0.1:5055", func(string) []*registry.Host { return list })("quay.io") {
		got = append(got, h.Name)
	}
	if fmt.Sprint(got) != "[10.0.0.1:5055 127.0.0.1:65001 quay.io]" {
		t.Errorf("asked are %v", got)
	}
}

func TestWithoutCertificates(t *testing.T) {
	own := &registry.Host{Name: "a", TLS: &tls.Config{ServerName: "b", Certificates: []tls.Certificate{{}}, MinVersion: tls.VersionTLS12}}
	plain := &registry.Host{Name: "c"}
	f := WithoutCertificates(func(string) []*registry.Host { return []*registry.Host{own, plain} })
	got := f("x")
	if len(got[0].TLS.Certificates) != 0 || got[0].TLS.ServerName != "b" || got[1] != plain || len(own.TLS.Certificates) != 1 {
		t.Errorf("%+v %+v", got[0], got[1])
	}
	if again := f("x"); again[0] != got[0] {
		t.Error("not the same host, so not the same connections")
	}
}
