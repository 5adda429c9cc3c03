package nydusapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
)

// table remembers what is mounted.
type table struct {
	mu  sync.Mutex
	all map[string]string // path: kind, source, config
	err error             // of every call
}

func (t *table) Mount(path string, kind Kind, source, config string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	if t.all[path] != "" {
		return errdefs.ErrAlreadyExists
	}
	t.all[path] = fmt.Sprintf("%s %s %s", kind, source, config)
	return nil
}

func (t *table) Unmount(path string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	if t.all[path] == "" {
		return errdefs.ErrNotFound
	}
	delete(t.all, path)
	return nil
}

// rig is a server on a socket.
type rig struct {
	table
	socket string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	g := &rig{table: table{all: map[string]string{}}, socket: filepath.Join(t.TempDir(), "s")}
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	srv := New(Config{ID: "s1", Mounts: g, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	go func() { ended <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return g
}

// answer is what a client reads.
type answer struct {
	status int
	header http.Header
	body   string
}

// send sends text as it is.
func (g *rig) send(t *testing.T, text string) answer {
	t.Helper()
	c, err := net.Dial("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(b)}
}

// strict decodes all of text, in which nothing may be that the client does not know.
func strict(t *testing.T, text string, v any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil || d.More() {
		t.Fatalf("%s: %v", text, err)
	}
}

// failed reads an error as both clients do: runtime-rs wants both fields.
func failed(t *testing.T, a answer) (code, message string) {
	t.Helper()
	var f struct{ Code, Message *string }
	strict(t, a.body, &f)
	if f.Code == nil || f.Message == nil || a.header.Get("Content-Type") != "application/json" {
		t.Fatalf("%+v", a)
	}
	return *f.Code, *f.Message
}

// dialect is how a client writes its requests.
type dialect struct {
	name                         string
	get                          string
	passthrough, rafs, gone, bad string // the last: a mount that is refused
}

// The bytes that both runtimes send: Go's net/http by nydusd.go, hyper 1 with
// hyperlocal, which puts the socket's path in hex and port 0 into the host, by
// nydus_client.rs.
var dialects = []dialect{
	{
		name:        "Go",
		get:         "GET /api/v1/daemon HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n",
		passthrough: goPost("/containers", `{"fs_type":"passthrough_fs","source":"/run/kata-containers/shared/sandboxes/s1/shared","config":""}`),
		rafs:        goPost("/rafs/c1/lowerdir", `{"fs_type":"rafs","source":"/run/tatami-host/trees/ab","config":"{}"}`),
		bad:         goPost("/rafs/c1/upperdir", `{"fs_type":"rafs","source":"/run/tatami-host/trees/ab","config":"{}"}`),
		gone:        "DELETE /api/v1/mount?mountpoint=/rafs/c1/lowerdir HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n",
	},
	{
		name:        "runtime-rs",
		get:         "GET /api/v1/daemon HTTP/1.1\r\ncontent-type: application/json\r\nhost: 2f72756e2f6b6174612f73312f6e79647573642d6170692e736f636b:0\r\n\r\n",
		passthrough: rustPost("%2Fcontainers", `{"fs_type":"passthrough_fs","source":"/run/kata-containers/shared/sandboxes/s1/rw","config":""}`),
		rafs:        rustPost("%2Frafs%2Fc1%2Flowerdir", `{"fs_type":"rafs","source":"/run/tatami-host/trees/ab","config":"{}"}`),
		bad:         rustPost("%2Frafs%2Fc1%2F..%2F..", `{"fs_type":"rafs","source":"/run/tatami-host/trees/ab","config":"{}"}`),
		gone:        "DELETE /api/v1/mount?mountpoint=%2Frafs%2Fc1%2Flowerdir HTTP/1.1\r\ncontent-type: application/json\r\nhost: 2f72756e2f6b6174612f73312f6e79647573642d6170692e736f636b:0\r\n\r\n",
	},
}

func goPost(mountpoint, body string) string {
	return fmt.Sprintf("POST /api/v1/mount?mountpoint=%s HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: %d\r\n"+
		"Content-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n%s", mountpoint, len(body), body)
}

func rustPost(mountpoint, body string) string {
	return fmt.Sprintf("POST /api/v1/mount?mountpoint=%s HTTP/1.1\r\ncontent-type: application/json\r\n"+
		"host: 2f72756e2f6b6174612f73312f6e79647573642d6170692e736f636b:0\r\ncontent-length: %d\r\n\r\n%s", mountpoint, len(body), body)
}

func TestDialects(t *testing.T) {
	for _, d := range dialects {
		t.Run(d.name, func(t *testing.T) {
			g := newRig(t)
			// nydus_client.rs: version and its five fields have no default.
			var info struct {
				ID      string
				Version struct {
					PackageVer *string `json:"package_ver"`
					GitCommit  *string `json:"git_commit"`
					BuildTime  *string `json:"build_time"`
					Profile    *string
					Rustc      *string
				}
				State string
			}
			a := g.send(t, d.get)
			strict(t, a.body, &info)
			if v := info.Version; a.status != http.StatusOK || info.State != "RUNNING" || info.ID != "s1" ||
				v.PackageVer == nil || v.GitCommit == nil || v.BuildTime == nil || v.Profile == nil || v.Rustc == nil {
				t.Errorf("%+v", a)
			}
			for _, request := range []string{d.passthrough, d.rafs} {
				if a := g.send(t, request); a.status != http.StatusNoContent || a.body != "" {
					t.Errorf("%+v", a)
				}
			}
			if !strings.HasPrefix(g.all["/containers"], "passthrough_fs /run/kata-containers/shared/sandboxes/s1/") ||
				g.all["/rafs/c1/lowerdir"] != "rafs /run/tatami-host/trees/ab {}" {
				t.Errorf("%v", g.all)
			}
			for request, want := range map[string]string{d.rafs: "AlreadyExists", d.bad: "InvalidArgument"} {
				if code, message := failed(t, g.send(t, request)); code != want || !strings.Contains(message, "/rafs/c1/") {
					t.Errorf("%s: %s", code, message)
				}
			}
			if a := g.send(t, d.gone); a.status != http.StatusNoContent || len(g.all) != 1 {
				t.Errorf("%+v, %v", a, g.all)
			}
			if code, _ := failed(t, g.send(t, d.gone)); code != "NotFound" {
				t.Error(code)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	g := newRig(t)
	const good = `{"fs_type":"rafs","source":"/s","config":"{}"}`
	for _, c := range []struct {
		name, method, uri, body string
		status                  int
	}{
		{"path", "GET", "/", "", 404},
		{"longer path", "GET", "/api/v1/daemon/", "", 404},
		{"version", "GET", "/api/v2/daemon", "", 404},
		{"daemon's method", "PUT", "/api/v1/daemon", `{}`, 405},
		{"mount's method", "GET", "/api/v1/mount?mountpoint=/containers", "", 405},
		{"put", "PUT", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", good, 405},
		{"no mountpoint", "POST", "/api/v1/mount", good, 400},
		{"two mountpoints", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir&mountpoint=/containers", good, 400},
		{"another parameter", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir&a=b", good, 400},
		{"encoding", "POST", "/api/v1/mount?mountpoint=%2", good, 400},
		{"root", "POST", "/api/v1/mount?mountpoint=/", good, 400},
		{"dots", "POST", "/api/v1/mount?mountpoint=/rafs/../lowerdir", good, 400},
		{"dot", "POST", "/api/v1/mount?mountpoint=/rafs/.tatami/lowerdir", good, 400},
		{"line break", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir%0a", good, 400},
		{"zero byte", "POST", "/api/v1/mount?mountpoint=/rafs/c1%00/lowerdir", good, 400},
		{"deeper", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir/x", good, 400},
		{"long", "POST", "/api/v1/mount?mountpoint=/rafs/" + strings.Repeat("c", 256) + "/lowerdir", good, 400},
		{"rafs at containers", "POST", "/api/v1/mount?mountpoint=/containers", good, 400},
		{"passthrough at rafs", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"fs_type":"passthrough_fs","source":"/s"}`, 400},
		{"kind", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"fs_type":"ext4","source":"/s"}`, 400},
		{"no body", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", "", 400},
		{"no record", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `[]`, 400},
		{"half", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"fs_type":"rafs","source":"/s"`, 400},
		{"two records", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", good + good, 400},
		{"no source", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"fs_type":"rafs"}`, 400},
		{"relative source", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"fs_type":"rafs","source":"s"}`, 400},
		{"zero byte in source", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"fs_type":"rafs","source":"/\u0000"}`, 400},
		{"long source", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"fs_type":"rafs","source":"/` + strings.Repeat("s", 4096) + `"}`, 400},
		{"large body", "POST", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", `{"config":"` + strings.Repeat("x", maxBody) + `"}`, 413},
		{"unmount of nothing", "DELETE", "/api/v1/mount?mountpoint=/rafs/c1/lowerdir", "", 404},
		{"unmount of root", "DELETE", "/api/v1/mount?mountpoint=/", "", 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := g.send(t, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: unix\r\nContent-Length: %d\r\n\r\n%s", c.method, c.uri, len(c.body), c.body))
			_, message := failed(t, a)
			if a.status != c.status || message == "" || len(g.all) != 0 {
				t.Errorf("%d %s, %v; want %d", a.status, message, g.all, c.status)
			}
			if (a.header.Get("Allow") != "") != (c.status == http.StatusMethodNotAllowed) {
				t.Errorf("allowed: %q", a.header.Get("Allow"))
			}
		})
	}
}

// What the mounts say has its status, and its text arrives.
func TestErrors(t *testing.T) {
	g := newRig(t)
	for err, status := range map[error]int{
		errdefs.ErrPermissionDenied: 403, errdefs.ErrNotFound: 404, errdefs.ErrFailedPrecondition: 409,
		errdefs.ErrResourceExhausted: 507, errdefs.ErrUnavailable: 503, errors.New("the disk burns"): 500,
	} {
		g.err = fmt.Errorf("do this: %w", err)
		for _, request := range []string{dialects[0].rafs, dialects[1].gone} {
			a := g.send(t, request)
			if code, message := failed(t, a); a.status != status || code == "" || !strings.Contains(message, "do this: "+err.Error()) {
				t.Errorf("%v: %+v", err, a)
			}
		}
	}
}

// One connection serves many requests, as the Go runtime's does.
func TestKeepAlive(t *testing.T) {
	g := newRig(t)
	c, err := net.Dial("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for _, request := range []string{dialects[0].get, dialects[0].passthrough, dialects[0].rafs, dialects[0].gone, dialects[0].get} {
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode >= 300 {
			t.Errorf("%s: %v", resp.Status, err)
		}
		resp.Body.Close()
	}
}

// Whatever is asked for, only the paths that are meant are mounted.
func FuzzMount(f *testing.F) {
	for _, d := range dialects {
		for _, request := range []string{d.get, d.passthrough, d.rafs, d.gone, d.bad} {
			f.Add([]byte(request))
		}
	}
	f.Add(bytes.Repeat([]byte("POST /api/v1/mount?mountpoint=%2Frafs%2F"), 9))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(text)))
		if err != nil {
			return
		}
		m := &table{all: map[string]string{}}
		w := &recorder{}
		New(Config{Mounts: m}).ServeHTTP(w, r)
		for at, what := range m.all {
			id, image := strings.CutPrefix(at, "/rafs/")
			id, image2 := strings.CutSuffix(id, "/lowerdir")
			kind, source, _ := strings.Cut(what, " ")
			isImage := image && image2 && id != "" && id[0] != '.' && !strings.Contains(id, "/")
			if kind == "rafs" && !isImage || kind == "passthrough_fs" && at != "/containers" || source[0] != '/' {
				t.Errorf("mounted %q at %q", what, at)
			}
		}
		if w.status != http.StatusOK && w.status != http.StatusNoContent {
			strict(t, w.body.String(), &failure{})
		}
	})
}

// recorder keeps an answer.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (w *recorder) Header() http.Header {
	if w.header == nil {
		w.header = http.Header{}
	}
	return w.header
}
func (w *recorder) WriteHeader(status int)      { w.status = status }
func (w *recorder) Write(p []byte) (int, error) { return w.body.Write(p) }
