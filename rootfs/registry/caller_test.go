package registry

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// seen is a server that answers 404 and notes headers.
type seen struct {
	*httptest.Server
	mu      sync.Mutex
	headers []http.Header
}

// challenge names a token service at another host of this machine, which the client
// itself asks under a name of its own.
const challenge = `Bearer realm="http://localhost:1/auth.test",service="s"`

func startSeen(t *testing.T, status int) *seen {
	t.Helper()
	s := new(seen)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.headers = append(s.headers, r.Header)
		s.mu.Unlock()
		w.Header().Set("WWW-Authenticate", challenge)
		w.Header().Set("Retry-After", "3")
		w.WriteHeader(status)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *seen) host() string { return strings.TrimPrefix(s.URL, "http://") }

// A caller's header goes to the registry itself and to mirrors on this machine; the
// client's credentials, and its headers for the registry, do not go with it.
func TestCaller(t *testing.T) {
	near, itself := startSeen(t, 404), startSeen(t, 401)
	secret := http.Header{"X-Secret": {"s"}, "Authorization": {"Basic bm9kZQ=="}}
	mirror := &Host{Name: near.host(), Scheme: "http", Path: "/v2", Capabilities: CanAll, Header: secret}
	last := &Host{Name: itself.host(), Scheme: "http", Path: "/v2", Capabilities: CanAll, Header: secret}
	client := New(Config{
		RetryMax: -1, Hosts: func(string) []*Host { return []*Host{mirror, last} },
		Credentials: auth.StaticCredential(itself.host(), auth.Credential{Username: "node", Password: "p"}),
	})
	defer client.Close()
	named, err := reference.ParseNormalizedNamed(itself.host() + "/a")
	if err != nil {
		t.Fatal(err)
	}
	for _, header := range []string{"", "Bearer x"} {
		near.headers, itself.headers = nil, nil
		ctx := WithCaller(t.Context(), header)
		if _, _, err := client.Repository(named).GetManifest(ctx, "v1"); err == nil {
			t.Fatal("no error")
		}
		a, err := client.Repository(named).Head(ctx, "manifests", "v1")
		if err != nil || a.Status != 401 || a.Header.Get("WWW-Authenticate") != challenge || a.Header.Get("Retry-After") != "3" {
			t.Errorf("%+v, %v", a, err)
		}
		if len(near.headers) != 1 || len(itself.headers) != 2 {
			t.Fatalf("%d and %d requests, want 1 and 2", len(near.headers), len(itself.headers))
		}
		for _, h := range itself.headers {
			if h.Get("Authorization") != header || h.Get("X-Secret") != "" {
				t.Errorf("the registry got %v", h)
			}
		}
		if h := near.headers[0]; h.Get("Authorization") != header || h.Get("X-Secret") != "s" {
			t.Errorf("the mirror got %v", h)
		}
	}
	if _, err := client.Repository(named).Head(t.Context(), "manifests", "../x"); err == nil {
		t.Error("a path is taken for a tag")
	}
}

// Where a registry sends one caller, nobody else is sent.
func TestTargetsOfCallers(t *testing.T) {
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader("0123456789"))
	}))
	defer storage.Close()
	var asked atomic.Int64
	itself := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.Header.Get("Authorization") != "Bearer good" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, storage.URL, http.StatusTemporaryRedirect)
	}))
	defer itself.Close()
	client := New(Config{RetryMax: -1})
	defer client.Close()
	named, err := reference.ParseNormalizedNamed(strings.TrimPrefix(itself.URL, "http://") + "/a")
	if err != nil {
		t.Fatal(err)
	}
	for i, tc := range []struct {
		header string
		asked  int64
	}{{"Bearer good", 1}, {"Bearer good", 1}, {"Bearer bad", 2}, {"", 3}, {"Bearer good", 3}} {
		body, err := client.Repository(named).Range(WithCaller(t.Context(), tc.header), digest.FromString("0123456789"), 0, 5)
		if err == nil {
			_ = body.Close() // what is in it does not matter
		}
		if (err == nil) != (tc.header == "Bearer good") || asked.Load() != tc.asked {
			t.Errorf("%d, %q: %v, %d requests to the registry", i, tc.header, err, asked.Load())
		}
	}
}
