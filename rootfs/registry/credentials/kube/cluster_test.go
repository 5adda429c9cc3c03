package kube_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials/kube"
)

const dockerConfigType = "kubernetes.io/dockerconfigjson"

// object is a secret of the API.
type object struct {
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata"`
	Data     map[string][]byte `json:"data"`
}

func (o object) version() int {
	v, _ := strconv.Atoi(o.Metadata["resourceVersion"]) // we wrote it
	return v
}

type change struct {
	Type   string `json:"type"`
	Object object `json:"object"`
}

// apiServer is the part of the Kubernetes API that lists and watches secrets, as it is
// documented (kubernetes.io, "Kubernetes API Concepts": resource versions, watches,
// bookmarks, limits).
type apiServer struct {
	*httptest.Server

	mu        sync.Mutex
	changed   *sync.Cond
	token     string // protected by mu, as the rest
	allowed   string // namespace that may be read; "" is all
	page      int    // secrets in an answer
	secrets   map[string]object
	changes   []change
	version   int
	forgotten int // versions up to this cannot be watched from
	lists     int
	broken    int // all watches up to this number end
	watches   int
	down      bool
}

func startAPI(t *testing.T) *apiServer {
	t.Helper()
	a := &apiServer{token: "t0ken", page: 2, secrets: map[string]object{}, version: 100}
	a.changed = sync.NewCond(&a.mu)
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(a.serve))
	a.EnableHTTP2 = true
	a.StartTLS()
	t.Cleanup(func() {
		a.breakOff()
		a.CloseClientConnections()
		a.Close()
	})
	return a
}

func (a *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	namespace, ok := strings.CutPrefix(r.URL.Path, "/api/v1/namespaces/")
	namespace, whole := strings.CutSuffix(namespace, "/secrets")
	if r.URL.Path == "/api/v1/secrets" {
		namespace, ok, whole = "", true, true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	q := r.URL.Query()
	switch kind, typed := strings.CutPrefix(q.Get("fieldSelector"), "type="); {
	case a.down:
		http.Error(w, "down", http.StatusServiceUnavailable)
	case r.Header.Get("Authorization") != "Bearer "+a.token:
		http.Error(w, "who are you", http.StatusUnauthorized)
	case !ok || !whole || !typed:
		http.Error(w, "what", http.StatusNotFound)
	case a.allowed != "" && a.allowed != namespace:
		http.Error(w, "not yours", http.StatusForbidden)
	case q.Get("watch") == "1":
		a.watch(w, r.Context(), namespace, kind, q.Get("resourceVersion"))
	default:
		a.list(w, namespace, kind, q.Get("continue"))
	}
}

func (a *apiServer) list(w http.ResponseWriter, namespace, kind, after string) {
	a.lists++
	items, more := []object{}, ""
	for _, name := range slices.Sorted(maps.Keys(a.secrets)) {
		o := a.secrets[name]
		if o.Type != kind || namespace != "" && o.Metadata["namespace"] != namespace || name <= after {
			continue
		}
		if len(items) == a.page {
			last := items[len(items)-1].Metadata
			more = last["namespace"] + "/" + last["name"]
			break
		}
		items = append(items, o)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{ // the client may be gone
		"kind": "SecretList", "metadata": map[string]string{"resourceVersion": fmt.Sprint(a.version), "continue": more}, "items": items,
	})
}

// watch holds a.mu but while it waits.
func (a *apiServer) watch(w http.ResponseWriter, ctx context.Context, namespace, kind, from string) {
	stop := context.AfterFunc(ctx, a.changed.Broadcast)
	defer stop()
	out := json.NewEncoder(w)
	a.watches++
	mine := a.watches
	seen, _ := strconv.Atoi(from)
	if seen <= a.forgotten {
		_ = out.Encode(map[string]any{"type": "ERROR", "object": map[string]any{"kind": "Status", "code": 410}})
		return
	}
	_ = out.Encode(map[string]any{"type": "BOOKMARK", "object": map[string]any{"kind": "Secret", "metadata": map[string]string{"resourceVersion": from}}})
	for {
		for _, c := range a.changes {
			v := c.Object.version()
			if v <= seen {
				continue
			}
			seen = v
			if c.Object.Type == kind && (namespace == "" || c.Object.Metadata["namespace"] == namespace) {
				_ = out.Encode(c)
			}
		}
		w.(http.Flusher).Flush()
		if ctx.Err() != nil || mine <= a.broken {
			return
		}
		a.changed.Wait()
	}
}

// put makes or changes a secret; no data removes it.
func (a *apiServer) put(_ *testing.T, namespace, name, kind, key, data string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	o := object{Type: kind, Data: map[string][]byte{key: []byte(data)}, Metadata: map[string]string{
		"namespace": namespace, "name": name, "resourceVersion": fmt.Sprint(a.version)}}
	_, known := a.secrets[namespace+"/"+name]
	what := map[bool]string{false: "ADDED", true: "MODIFIED"}[known]
	a.secrets[namespace+"/"+name] = o
	if data == "" {
		what = "DELETED"
		delete(a.secrets, namespace+"/"+name)
	}
	a.changes = append(a.changes, change{what, o})
	a.changed.Broadcast()
}

func (a *apiServer) breakOff() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.broken = a.watches
	a.changed.Broadcast()
}

func (a *apiServer) with(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// kubeconfig writes one with a user, in YAML, and returns its path.
func (a *apiServer) kubeconfig(t *testing.T, namespace, user string) string {
	t.Helper()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})
	return writeKubeconfig(t, a.URL, ca, namespace, user)
}

func writeKubeconfig(t *testing.T, server string, ca []byte, namespace, user string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	write(t, path, fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: here
contexts:
- {name: other, context: {cluster: none, user: none}}
- {name: here, context: {cluster: c, user: u, namespace: %q}}
clusters:
- name: c
  cluster: {server: %q, certificate-authority-data: %s}
users:
- name: u
  user: %s
`, namespace, server, base64.StdEncoding.EncodeToString(ca), user))
	return path
}

// pullSecret is what is in a secret of type dockerconfigjson.
func pullSecret(pattern, password string) string {
	return fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, pattern, encode("u", password))
}

// awaits waits until a source has a password for a repository; "" is none.
func awaits(t *testing.T, s credentials.Source, repository, want string) {
	t.Helper()
	got := "no answer"
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		cred, err := s.Credential(kube.WithLookup(t.Context(), repository, false), "r.example")
		if err != nil {
			t.Fatal(err)
		}
		if got = cred.Password; got == want {
			return
		}
	}
	t.Errorf("the password for %s is %q, want %q", repository, got, want)
}

// followsSecrets changes secrets of a cluster under a source that watches them.
func followsSecrets(t *testing.T, s credentials.Source, put func(t *testing.T, namespace, name, kind, key, data string)) {
	t.Helper()
	const key = ".dockerconfigjson"
	awaits(t, s, "r.example/x", "")
	put(t, "a", "one", dockerConfigType, key, pullSecret("r.example", "p1"))
	awaits(t, s, "r.example/x", "p1")
	put(t, "a", "one", dockerConfigType, key, pullSecret("r.example", "p2"))
	awaits(t, s, "r.example/x", "p2")
	put(t, "b", "two", dockerConfigType, key, pullSecret("r.example/x", "p3"))
	awaits(t, s, "r.example/x", "p3") // it says more precisely what it is for
	awaits(t, s, "r.example/y", "p2")
	put(t, "b", "two", dockerConfigType, key, "")
	awaits(t, s, "r.example/x", "p2")
	put(t, "a", "old", "kubernetes.io/dockercfg", ".dockercfg", `{"https://old.example": {"username": "u", "password": "p4"}}`)
	awaits(t, s, "old.example/z", "p4")
	put(t, "a", "opaque", "Opaque", key, pullSecret("opaque.example", "p5"))
	for i := range 7 { // several pages for the next one who lists
		put(t, "a", fmt.Sprintf("many%d", i), dockerConfigType, key, pullSecret(fmt.Sprintf("many%d.example", i), fmt.Sprint("many", i)))
	}
	awaits(t, s, "many6.example/x", "many6")
	awaits(t, s, "opaque.example/x", "")
}

func TestClusterSecrets(t *testing.T) {
	a := startAPI(t)
	path := a.kubeconfig(t, "", "{token: t0ken}")
	followsSecrets(t, open(t, "", path)[0], a.put)
	later := open(t, "", path)[0]
	for i := range 7 {
		awaits(t, later, fmt.Sprintf("many%d.example/x", i), fmt.Sprint("many", i))
	}
}

// What a source knows outlives its API server, and it goes on when that is back.
func TestClusterComesAndGoes(t *testing.T) {
	a := startAPI(t)
	a.put(t, "a", "one", dockerConfigType, ".dockerconfigjson", pullSecret("r.example", "p1"))
	token := filepath.Join(t.TempDir(), "token")
	write(t, token, "t0ken\n")
	s := open(t, "", a.kubeconfig(t, "", "{tokenFile: "+token+"}"))[0]
	awaits(t, s, "r.example/x", "p1")
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"a watch that ends", a.breakOff},
		{"a version that is forgotten", func() {
			a.with(func() { a.version += 10; a.forgotten = a.version - 1 })
			a.breakOff()
		}},
		{"connections that break", func() { a.breakOff(); a.CloseClientConnections() }},
		{"a server that is down", func() { a.with(func() { a.down = true }); a.breakOff(); time.Sleep(50 * time.Millisecond) }},
		{"another token", func() {
			a.with(func() { a.token = "an0ther"; a.down = false })
			write(t, token, "an0ther")
			a.breakOff()
		}},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.do()
			awaits(t, s, "r.example/x", "p1")
			if step.name == "a server that is down" {
				return
			}
			a.put(t, "a", "two", dockerConfigType, ".dockerconfigjson", pullSecret("r2.example", step.name))
			awaits(t, s, "r2.example/x", step.name)
		})
	}
}

// RBAC may show one namespace only.
func TestClusterNamespace(t *testing.T) {
	a := startAPI(t)
	a.allowed = "mine"
	a.put(t, "mine", "one", dockerConfigType, ".dockerconfigjson", pullSecret("r.example", "p1"))
	a.put(t, "theirs", "one", dockerConfigType, ".dockerconfigjson", pullSecret("r2.example", "p2"))
	s := open(t, "", a.kubeconfig(t, "mine", "{token: t0ken}"))[0]
	awaits(t, s, "r.example/x", "p1")
	awaits(t, s, "r2.example/x", "")
	refused := open(t, "", a.kubeconfig(t, "", "{token: t0ken}"))[0]
	_, err := refused.Credential(kube.WithLookup(t.Context(), "r.example/x", false), "r.example")
	if err == nil || !strings.Contains(err.Error(), "ClusterRole") || strings.Contains(err.Error(), "t0ken") {
		t.Errorf("without the right to list: %v", err)
	}
}

// Of two secrets for a registry the one that it refuses gives way, and a pull secret
// that cannot be decoded disturbs nobody.
func TestClusterRefused(t *testing.T) {
	reg := private(t, true)
	a := startAPI(t)
	a.put(t, "a", "wrong", dockerConfigType, ".dockerconfigjson", pullSecret(reg.Host(), "canary"))
	a.put(t, "b", "right", dockerConfigType, ".dockerconfigjson", fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, reg.Host(), encode("user", "s3cr3t")))
	a.put(t, "c", "broken", dockerConfigType, ".dockerconfigjson", `{"auths": {"x": {"auth": "canary"}}}`)
	var log bytes.Buffer
	sources, err := kube.Open([]string{a.kubeconfig(t, "", "{token: t0ken}")}, "", slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, reg, sources...)
	var said string
	for range 3 {
		if err = c.resolve(t, "library/x"); err == nil {
			break
		}
		said += err.Error()
	}
	if err != nil {
		t.Error(err)
	}
	if err := sources.Close(); err != nil {
		t.Error(err)
	}
	for _, secret := range []string{"canary", "s3cr3t", "t0ken", encode("user", "s3cr3t")} {
		if strings.Contains(log.String()+c.log.String()+said, secret) {
			t.Errorf("%s is in %s%s%s", secret, log.String(), c.log.String(), said)
		}
	}
	if !strings.Contains(log.String(), "c/broken") {
		t.Errorf("logged %s", log.String())
	}
}

// Users of a kubeconfig: certificates, files beside it, and programs.
func TestKubeconfigUsers(t *testing.T) {
	h := newHelper(t, "get-token")
	a := startAPI(t)
	a.put(t, "a", "one", dockerConfigType, ".dockerconfigjson", pullSecret("r.example", "p1"))
	h.set(t, "answer", `{"kind": "ExecCredential", "apiVersion": "client.authentication.k8s.io/v1", "status": {"token": "t0ken", "expirationTimestamp": "2100-01-01T00:00:00Z"}}`)
	exec := "{exec: {apiVersion: client.authentication.k8s.io/v1, command: get-token, args: [get-credentials], env: [{name: A, value: b}]}}"
	awaits(t, open(t, "", a.kubeconfig(t, "", exec))[0], "r.example/x", "p1")
	if n := len(h.runs(t)); n != 2 { // one for each type of secrets
		t.Errorf("the program ran %d times", n)
	}
	path := a.kubeconfig(t, "", "{tokenFile: beside}")
	write(t, filepath.Join(filepath.Dir(path), "beside"), "t0ken")
	awaits(t, open(t, "", path)[0], "r.example/x", "p1")
}

// A certificate is what kubelets have.
func TestKubeconfigCertificate(t *testing.T) {
	a := startAPI(t)
	a.token = "" // "Bearer " is what a test's server wants to see
	pair := a.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	seen := make(chan bool, 10)
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case seen <- len(r.TLS.PeerCertificates) == 1:
		default:
		}
		r.Header.Set("Authorization", "Bearer ")
		a.serve(w, r)
	}))
	front.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS12}
	front.StartTLS()
	t.Cleanup(func() { a.breakOff(); front.CloseClientConnections(); front.Close() })
	a.put(t, "a", "one", dockerConfigType, ".dockerconfigjson", pullSecret("r.example", "p1"))
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})
	path := writeKubeconfig(t, front.URL, ca, "", "{client-certificate: c.pem, client-key-data: "+base64.StdEncoding.EncodeToString(keyPEM)+"}")
	write(t, filepath.Join(filepath.Dir(path), "c.pem"), string(cert))
	awaits(t, open(t, "", path)[0], "r.example/x", "p1")
	if !<-seen {
		t.Error("the certificate was not presented")
	}
}

func TestKubeconfigMistakes(t *testing.T) {
	a := startAPI(t)
	good, err := os.ReadFile(a.kubeconfig(t, "", "{token: canary}"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, old, new, want string }{
		{"context", "current-context: here", "current-context: there", "current-context"},
		{"no TLS", "https://", "http://", "https://"},
		{"data", "certificate-authority-data: ", "certificate-authority-data: '?' # ", "base64"},
		{"no certificate", "certificate-authority-data: ", "certificate-authority-data: YQ== # ", "no certificate"},
		{"file", "{token: canary}", "{client-certificate: absent.pem}", "absent.pem"},
		{"pair", "{token: canary}", "{client-certificate-data: Y2FuYXJ5, client-key-data: Y2FuYXJ5}", "no pair"},
		{"provider", "{token: canary}", "{auth-provider: {name: gcp}}", "auth-provider"},
		{"exec", "{token: canary}", "{exec: {apiVersion: v1, command: x}}", "exec"},
		{"program", "{token: canary}", "{exec: {apiVersion: client.authentication.k8s.io/v1, command: ./absent}}", "absent"},
		{"refused", "none", "none", "401"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "k")
			text := strings.Replace(string(good), tc.old, tc.new, 1)
			if tc.name == "data" || tc.name == "no certificate" {
				text = strings.Replace(text, "}\nusers", "\n  }\nusers", 1) // after the comment
			}
			write(t, path, text)
			var log syncBuffer
			s, err := kube.Open([]string{path}, "", slog.New(slog.NewTextHandler(&log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for end := time.Now().Add(30 * time.Second); !strings.Contains(log.String(), "cannot be followed"); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("nothing is said: %s", log.String())
				}
			}
			if said := log.String(); !strings.Contains(said, tc.want) || strings.Contains(said, "canary") || strings.Contains(said, "Y2FuYXJ5") {
				t.Errorf("it says %s, want %q", said, tc.want)
			}
		})
	}
	path := filepath.Join(t.TempDir(), "k")
	write(t, path, "kind: Config\nclusters: 5\n")
	if _, err := kube.Open([]string{path}, "", discard); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("one that cannot be decoded: %v", err)
	}
}

// syncBuffer is a buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// A provider that needs tokens of service accounts is the kubelet's alone.
func TestProviderWithTokens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.json")
	write(t, path, `{"kind":"CredentialProviderConfig","apiVersion":"kubelet.config.k8s.io/v1","providers":[
		{"name":"pods-only","matchImages":["*.example"],"defaultCacheDuration":"0","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
		 "tokenAttributes":{"requireServiceAccount":true,"serviceAccountTokenAudience":"x","cacheType":"Token"}}]}`)
	var log bytes.Buffer
	s, err := kube.Open([]string{path}, "/absent", slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil || len(s) != 1 || !strings.Contains(log.String(), "pods-only") || !strings.Contains(log.String(), "cri.image_service") {
		t.Fatalf("%d sources, error %v, logged %s", len(s), err, log.String())
	}
	cred, err := s[0].Credential(kube.WithLookup(t.Context(), "r.example/x", false), "r.example")
	if err != nil || cred != auth.EmptyCredential {
		t.Errorf("error %v", err)
	}
}

// openKubeconfig opens the source of a kubeconfig with the token of startAPI.
func openKubeconfig(t *testing.T, server string, ca *x509.Certificate) credentials.Source {
	t.Helper()
	path := writeKubeconfig(t, server, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), "", "{token: t0ken}")
	sources, err := kube.Open([]string{path}, "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sources.Close() }) // its watch is broken off
	return sources[0]
}

// What cannot be decoded any more is not known any more.
func TestClusterBrokenSecret(t *testing.T) {
	a := startAPI(t)
	s := openKubeconfig(t, a.URL, a.Certificate())
	a.put(t, "a", "one", dockerConfigType, ".dockerconfigjson", pullSecret("r.example", "p1"))
	awaits(t, s, "r.example/x", "p1")
	a.put(t, "a", "one", dockerConfigType, ".dockerconfigjson", "{")
	awaits(t, s, "r.example/x", "")
}

// An API server that sends us elsewhere does not send our token there.
func TestClusterRedirect(t *testing.T) {
	elsewhere := startAPI(t)
	server := httptest.NewTLSServer(http.RedirectHandler(elsewhere.URL+"/api/v1/secrets?fieldSelector=type%3D"+dockerConfigType, http.StatusTemporaryRedirect))
	defer server.Close()
	s := openKubeconfig(t, server.URL, server.Certificate())
	_, err := s.Credential(kube.WithLookup(t.Context(), "r.example/x", false), "r.example")
	if err == nil || !strings.Contains(err.Error(), "307") {
		t.Error(err)
	}
	elsewhere.with(func() {
		if elsewhere.lists != 0 {
			t.Errorf("%d lists elsewhere", elsewhere.lists)
		}
	})
}

// More secrets than we keep are a mistake that is told, and no memory.
func TestClusterTooMany(t *testing.T) {
	a := startAPI(t)
	a.page = 500
	for i := range 10_001 {
		name := fmt.Sprint(i)
		a.secrets["a/"+name] = object{Type: dockerConfigType, Data: map[string][]byte{".dockerconfigjson": []byte("{}")},
			Metadata: map[string]string{"namespace": "a", "name": name, "resourceVersion": "1"}}
	}
	s := openKubeconfig(t, a.URL, a.Certificate())
	_, err := s.Credential(kube.WithLookup(t.Context(), "r.example/x", false), "r.example")
	if err == nil || !strings.Contains(err.Error(), "more than 10000") {
		t.Error(err)
	}
}

// An event without an end is not read for ever.
func TestClusterLongEvent(t *testing.T) {
	const most = 48 << 20 // read at most, with what the connection holds
	sent := make(chan int, 1)
	var begun atomic.Bool
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") == "" {
			_, _ = w.Write([]byte(`{"metadata": {"resourceVersion": "1"}, "items": []}`)) // the client may be gone
			return
		}
		if begun.Swap(true) { // one is enough
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		}
		n, err := w.Write([]byte(`{"type": "ADDED", "object": {"x": "`))
		for chunk := bytes.Repeat([]byte("x"), 1<<20); err == nil && n <= most; n += len(chunk) {
			_, err = w.Write(chunk)
		}
		sent <- n
	}))
	t.Cleanup(server.Close) // after the source, which watches
	openKubeconfig(t, server.URL, server.Certificate())
	select {
	case n := <-sent:
		if n > most {
			t.Errorf("more than %d bytes of one event are read", most)
		}
	case <-time.After(30 * time.Second):
		t.Error("no watch ends")
	}
}
