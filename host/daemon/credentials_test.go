package daemon

import (
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// canary is in every password here.
const canary = "canary-77ab"

// place is a place of credentials that can be changed.
type place struct {
	name string
	// open returns the value of registry.credentials, and set, which changes the
	// password of user "user" there for a registry.
	open func(t *testing.T, host string) (path string, set func(password string))
}

// bins is where the places' programs are.
func bins(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "bin")
	check(t, os.MkdirAll(dir, 0o700))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return dir
}

// replace changes a file as the kubelet does: a reader has the old or the new one.
func replace(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path+".new", []byte(text), 0o700), os.Rename(path+".new", path))
}

func pullSecret(host, password string) string {
	return fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, host, base64.StdEncoding.EncodeToString([]byte("user:"+password)))
}

var places = []place{
	{"config.json", func(t *testing.T, host string) (string, func(string)) {
		path := filepath.Join(t.TempDir(), "config.json")
		return path, func(p string) { replace(t, path, pullSecret(host, p)) }
	}},
	{"helper", func(t *testing.T, host string) (string, func(string)) {
		path, bin := filepath.Join(t.TempDir(), "config.json"), bins(t)
		replace(t, path, `{"credsStore": "tatami-test"}`)
		return path, func(p string) {
			replace(t, filepath.Join(bin, "docker-credential-tatami-test"), fmt.Sprintf("#!/bin/sh\ncat >/dev/null\necho '{\"Username\": \"user\", \"Secret\": %q}'\n", p))
		}
	}},
	{"secrets", func(t *testing.T, host string) (string, func(string)) {
		dir := t.TempDir()
		return dir, func(p string) { replace(t, filepath.Join(dir, "pod", ".dockerconfigjson"), pullSecret(host, p)) }
	}},
	{"provider", func(t *testing.T, host string) (string, func(string)) {
		path, bin := filepath.Join(t.TempDir(), "providers.yaml"), bins(t)
		replace(t, path, `{"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": [{"name": "tatami-test",
			"matchImages": ["`+host+`"], "defaultCacheDuration": "0s", "apiVersion": "credentialprovider.kubelet.k8s.io/v1"}]}`)
		return path + "\"\ncredential_provider_bin_dir = \"" + bin, func(p string) {
			replace(t, filepath.Join(bin, "tatami-test"), fmt.Sprintf(`#!/bin/sh
cat >/dev/null
echo '{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "cacheKeyType": "Registry", "auth": {%q: {"username": "user", "password": %q}}}'
`, host, p))
		}
	}},
	{"kubeconfig", func(t *testing.T, host string) (string, func(string)) {
		a := &secretAPI{host: host, changed: make(chan struct{})}
		s := httptest.NewTLSServer(a)
		t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
		ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
		path := filepath.Join(t.TempDir(), "kubeconfig")
		replace(t, path, fmt.Sprintf(`{"kind": "Config", "current-context": "a", "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
			"clusters": [{"name": "a", "cluster": {"server": %q, "certificate-authority-data": %q}}], "users": [{"name": "a", "user": {"token": "%s-t0ken"}}]}`,
			s.URL, base64.StdEncoding.EncodeToString(ca), canary))
		return path, a.set
	}},
}

// secretAPI is an API server with one pull secret; rootfs/registry/credentials/kube
// has tests of all that a client has to know of it.
type secretAPI struct {
	host string

	mu       sync.Mutex
	password string        // protected by mu
	version  int           // protected by mu
	changed  chan struct{} // closed by the next set; protected by mu
}

func (a *secretAPI) set(password string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.password = password
	a.version++
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *secretAPI) secret() (text string, version int, changed chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	data := base64.StdEncoding.EncodeToString([]byte(pullSecret(a.host, a.password)))
	return fmt.Sprintf(`{"metadata": {"namespace": "a", "name": "b", "resourceVersion": "%d"}, "data": {".dockerconfigjson": %q}}`, a.version, data), a.version, a.changed
}

func (a *secretAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	secret, version, changed := a.secret()
	switch q := r.URL.Query(); {
	case r.Header.Get("Authorization") != "Bearer "+canary+"-t0ken":
		http.Error(w, "no", http.StatusUnauthorized)
	case q.Get("fieldSelector") != "type=kubernetes.io/dockerconfigjson" && q.Get("watch") == "":
		fmt.Fprintf(w, `{"metadata": {"resourceVersion": "1"}, "items": []}`)
	case q.Get("fieldSelector") != "type=kubernetes.io/dockerconfigjson":
		<-r.Context().Done()
	case q.Get("watch") == "":
		fmt.Fprintf(w, `{"metadata": {"resourceVersion": "%d"}, "items": [%s]}`, version, secret)
	default:
		w.(http.Flusher).Flush()
		for from := q.Get("resourceVersion"); ; {
			if fmt.Sprint(version) != from {
				from = fmt.Sprint(version)
				fmt.Fprintf(w, `{"type": "MODIFIED", "object": %s}`, secret)
				w.(http.Flusher).Flush()
			}
			select {
			case <-changed:
			case <-r.Context().Done():
				return
			}
			secret, version, changed = a.secret()
		}
	}
}

// privateFiles is how many files a layer of the private image has: two for each read.
const privateFiles = 5

// A private image is read by the credentials of each place, while workers end and
// passwords change under its mount. No password is kept, said, or shown.
func TestPlacesOfCredentials(t *testing.T) {
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			h := newHost(t, session.Direct, share)
			h.reg = registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: canary + "-0"}})
			path, set := p.open(t, h.reg.Host())
			set(canary + "-0")
			h.configure(share + "[registry]\ncredentials = \"" + path + "\"\n")
			h.start()
			img := h.pushAs("private", 1, privateFiles, func(tarball []byte) (registrytest.Layer, error) { return registrytest.EStargz(tarball) })
			s := h.snapshotter("share")
			s.pull(img)
			root := h.container("c1", s, img)
			pid := h.awaitWorker(0)
			next := layers*privateFiles - 1
			reads := func(what string) {
				t.Helper()
				before := len(h.reg.Requests("/private/blobs/"))
				if err := img.verify(root, next); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				if len(h.reg.Requests("/private/blobs/")) == before {
					t.Errorf("%s: the registry was not asked", what)
				}
				next -= 2 // what is fetched may reach into the one before
			}
			reads("a mounted image")
			check(t, syscall.Kill(pid, syscall.SIGKILL))
			reads("a worker that was killed")
			pid = h.awaitWorker(pid)
			check(t, h.cmd.Process.Signal(syscall.SIGHUP))
			reads("an upgrade")
			h.awaitWorker(pid)
			for n := range 2 {
				password := fmt.Sprint(canary, "-", n+1)
				set(password)
				h.reg.SetPassword(password)
				h.reg.ExpireTokens()
				reads("a rotation")
			}
			h.checkSecret()
			h.unmountHere("c1")
			s.remove("c1")
			h.end(syscall.SIGTERM)
		})
	}
}

// checkSecret looks for passwords in all files of the node (not in its mounts), and in
// what its processes were started with and have mounted.
func (h *host) checkSecret() {
	h.t.Helper()
	planted := filepath.Join(h.dir, "planted") // so that the search is known to find
	check(h.t, os.WriteFile(planted, []byte("x"+canary), 0o600))
	var found []string
	look := func(path string) {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), canary) {
			found = append(found, path)
		}
	}
	device := func(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Dev }
	home, err := os.Stat(h.dir)
	check(h.t, err)
	check(h.t, filepath.WalkDir(h.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if device(info) != device(home) {
			return fs.SkipDir
		}
		if info.Mode().IsRegular() {
			look(path)
		}
		return nil
	}))
	for _, pid := range []int{h.cmd.Process.Pid, worker(h.cmd.Process.Pid)} {
		for _, name := range []string{"cmdline", "environ", "mountinfo"} {
			look(fmt.Sprintf("/proc/%d/%s", pid, name))
		}
	}
	if !slices.Equal(found, []string{planted}) {
		h.t.Errorf("a password is in %q (planted: %s)", found, planted)
	}
	if said := h.status().String(); strings.Contains(said, canary) {
		h.t.Errorf("the status has a password: %s", said)
	}
	check(h.t, unix.Unlink(planted))
}
