package containerd

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

// registry is a docker-registry of Debian behind a proxy that counts.
type registry struct {
	host   string // of the proxy; for references
	behind string // of docker-registry; for pushes

	failing atomic.Bool // requests of tatami-host for blobs

	mu    sync.Mutex
	blobs map[string]int64 // bytes sent by path; protected by mu
	// passwords of private repositories, of any user; protected by mu
	passwords map[string]string
}

const registryConfig = `
version: 0.1
log: {level: error}
storage:
  filesystem: {rootdirectory: %s}
http: {addr: %s}
`

func startRegistry(t testing.TB) *registry {
	t.Helper()
	need(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &registry{behind: l.Addr().String(), blobs: map[string]int64{}}
	l.Close() // the port stays free long enough
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, registryConfig, filepath.Join(dir, "data"), r.behind), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "docker-registry", "serve", config)
	log, err := os.Create(filepath.Join(dir, "log")) // it calls what is not there yet an error
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() }) // t.Context has ended it
	target := &url.URL{Scheme: "http", Host: r.behind}
	until(t, func() error {
		resp, err := http.Get(target.String() + "/v2/")
		if err == nil {
			resp.Body.Close()
		}
		return err
	})
	proxy := r.guard(&httputil.ReverseProxy{
		Rewrite:        func(p *httputil.ProxyRequest) { p.SetURL(target); p.Out.Host = p.In.Host },
		ModifyResponse: r.watch,
		FlushInterval:  10 * time.Millisecond,
	})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if r.failing.Load() && strings.Contains(req.URL.Path, "/blobs/") && req.UserAgent() == "tatami-host" {
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		proxy.ServeHTTP(w, req)
	}))
	t.Cleanup(front.Close)
	r.host = front.Listener.Addr().String()
	return r
}

// protect makes a repository private; with another password the last one is refused
// from now on.
func (r *registry) protect(repo, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.passwords == nil {
		r.passwords = map[string]string{}
	}
	r.passwords[repo] = password
}

// guard asks for basic authentication (RFC 7617) before private repositories.
func (r *registry) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, given, _ := req.BasicAuth()
		r.mu.Lock()
		refused := false
		for repo, password := range r.passwords {
			refused = refused || strings.HasPrefix(req.URL.Path, "/v2/"+repo+"/") && given != password
		}
		r.mu.Unlock()
		if refused {
			w.Header().Set("WWW-Authenticate", `Basic realm="tests"`)
			http.Error(w, `{"errors": [{"code": "UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, req)
	})
}

// watch counts the bytes of an answer as they are sent on.
func (r *registry) watch(resp *http.Response) error {
	if strings.Contains(resp.Request.URL.Path, "/blobs/") {
		resp.Body = counted{resp.Body, r, resp.Request.URL.Path}
	}
	return nil
}

type counted struct {
	io.ReadCloser
	r    *registry
	path string
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.r.blobs[c.path] += int64(n)
	return n, err
}

// sent is how many bytes of a blob have been sent, over all answers.
func (r *registry) sent(repo string, b blob) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.blobs["/v2/"+repo+"/blobs/"+b.digest]
}

// push adds an image and returns its reference.
func (r *registry) push(t testing.TB, repo, tag string, layout ocilayout.Dir) string {
	t.Helper()
	if err := layout.Push(t.Context(), r.behind+"/"+repo, tag); err != nil {
		t.Fatal(err)
	}
	return r.host + "/" + repo + ":" + tag
}
