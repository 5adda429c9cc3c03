package kube_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/reference"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
	"github.com/tatami-containers/tatami/rootfs/registry/credentials/kube"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// helper is a program that was built for the test, see testdata/helper.
type helper struct{ dir, bin string }

// newHelper builds the program under each of names in a directory that is in PATH.
func newHelper(t *testing.T, names ...string) *helper {
	t.Helper()
	h := &helper{dir: t.TempDir(), bin: t.TempDir()}
	first := filepath.Join(h.bin, names[0])
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", first, "./testdata/helper").CombinedOutput(); err != nil {
		t.Fatalf("build the helper: %v\n%s", err, out)
	}
	for _, name := range names[1:] {
		if err := os.Link(first, filepath.Join(h.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("HELPER_DIR", h.dir)
	t.Setenv("PATH", h.bin+":"+os.Getenv("PATH"))
	return h
}

func (h *helper) set(t *testing.T, name, text string) {
	t.Helper()
	write(t, filepath.Join(h.dir, name), text)
}

func (h *helper) unset(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(h.dir, name)); err != nil {
		t.Fatal(err)
	}
}

// runs returns a line for each time that the program ran.
func (h *helper) runs(t *testing.T) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(h.dir, "runs"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func parse(t *testing.T, name string) reference.Named {
	t.Helper()
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func encode(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}

func open(t *testing.T, bin string, paths ...string) []credentials.Source {
	t.Helper()
	sources, err := kube.Open(paths, bin, discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sources.Close(); err != nil {
			t.Error(err)
		}
	})
	return sources
}

// private is a registry that wants a password, with an image in it.
func private(t *testing.T, basic bool) *registrytest.Server {
	t.Helper()
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "s3cr3t", Basic: basic}})
	reg.PushImage("library/x", "v1", registrytest.Image{})
	reg.PushImage("other/y", "v1", registrytest.Image{})
	return reg
}

// client is a client of a registry with a chain of sources, and what it logs.
type client struct {
	*registry.Client
	log  bytes.Buffer
	host string
}

func newClient(t *testing.T, reg *registrytest.Server, sources ...credentials.Source) *client {
	t.Helper()
	c := &client{host: reg.Host()}
	log := slog.New(slog.NewTextHandler(&c.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c.Client = registry.New(registry.Config{RetryWait: time.Millisecond, Log: log, Credentials: credentials.Chain(log, sources...)})
	t.Cleanup(func() { _ = c.Close() }) // never fails
	return c
}

func (c *client) resolve(t *testing.T, repository string) error {
	t.Helper()
	_, err := c.Repository(parse(t, c.host+"/"+repository)).Resolve(t.Context(), "v1")
	return err
}

// discard is a log that nobody reads.
var discard = slog.New(slog.DiscardHandler)

// one has a credential for one repository.
type one struct {
	mu         sync.Mutex
	repository string
	credential auth.Credential
}

func (o *one) set(repository string, c auth.Credential) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.repository, o.credential = repository, c
}

func (o *one) Credential(ctx context.Context, _ string) (auth.Credential, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if registry.LookupOf(ctx).Repository != o.repository {
		return auth.EmptyCredential, nil
	}
	return o.credential, nil
}

// TestOrder: the first source that has something counts, and one that fails
// does not hide the next.
func TestOrder(t *testing.T) {
	for _, basic := range []bool{false, true} {
		t.Run(fmt.Sprintf("basic %v", basic), func(t *testing.T) {
			reg := private(t, basic)
			dir := t.TempDir()
			config, broken := filepath.Join(dir, "config.json"), filepath.Join(dir, "broken.json")
			write(t, broken, fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, reg.Host(), base64.StdEncoding.EncodeToString([]byte("s3cr3t without a colon"))))
			pull := &one{}
			c := newClient(t, reg, append([]credentials.Source{pull}, open(t, "", broken, config)...)...)
			if err := c.resolve(t, "library/x"); err == nil || !strings.Contains(err.Error(), broken) {
				t.Errorf("only a broken file: %v", err)
			}
			write(t, config, fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, reg.Host(), encode("user", "s3cr3t")))
			if err := c.resolve(t, "library/x"); err != nil {
				t.Errorf("after a login: %v", err)
			}
			if !strings.Contains(c.log.String(), "a source of credentials fails") {
				t.Errorf("log %s", &c.log)
			}
			// The first source wins, for its repository only.
			pull.set(reg.Host()+"/other/y", auth.Credential{Username: "user", Password: "wrong-s3cr3t"})
			if err := c.resolve(t, "other/y"); err == nil {
				t.Error("the first source does not count")
			}
			if err := c.resolve(t, "library/x"); err != nil {
				t.Errorf("another repository: %v", err)
			}
			pull.set("", auth.Credential{})
			if err := c.resolve(t, "other/y"); err != nil {
				t.Errorf("when it has nothing: %v", err)
			}
			if out := c.log.String(); strings.Contains(out, "s3cr3t") {
				t.Errorf("a secret in the log: %s", out)
			}
		})
	}
}

// TestDockerHelpers has config.json name real programs.
func TestDockerHelpers(t *testing.T) {
	h := newHelper(t, "docker-credential-tatami-test", "docker-credential-tatami-store")
	reg := private(t, true)
	config := filepath.Join(t.TempDir(), "config.json")
	good := `{"ServerURL":"x","Username":"user","Secret":"s3cr3t"}`
	for _, tc := range []struct {
		name, config, answer string
		exit                 bool
		err                  string // "" is a success
	}{
		{"helper of the registry", `{"credHelpers":{"HOST":"tatami-test"},"credsStore":"none-such"}`, good, false, ""},
		{"store of all", `{"credsStore":"tatami-store"}`, good, false, ""},
		{"helper before auths", `{"auths":{"HOST":{"auth":"` + encode("user", "old-s3cr3t") + `"}},"credHelpers":{"HOST":"tatami-test"}}`, good, false, ""},
		{"nothing found", `{"credsStore":"tatami-store"}`, "credentials not found in native keychain", true, "no credentials"},
		{"helper fails", `{"credsStore":"tatami-store"}`, "cannot decrypt s3cr3t", true, "exit status 1"},
		{"no JSON", `{"credsStore":"tatami-store"}`, "s3cr3t", false, "not JSON"},
		{"hub", `{"credHelpers":{"docker.io":"tatami-test"}}`, good, false, "no credentials"},
		{"path as helper", `{"credsStore":"../x"}`, good, false, "without docker-credential-"},
		{"no such helper", `{"credsStore":"none-such"}`, good, false, "docker-credential-none-such"},
		{"broken file", `{"auths":{"HOST":"s3cr3t"}}`, good, false, "config.json"},
		{"not JSON", `s3cr3t`, good, false, "config.json"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			write(t, config, strings.ReplaceAll(tc.config, "HOST", reg.Host()))
			h.set(t, "answer", tc.answer)
			if tc.exit {
				h.set(t, "exit", "")
				defer h.unset(t, "exit")
			}
			c := newClient(t, reg, open(t, "", config)...)
			before := len(h.runs(t))
			err := c.resolve(t, "library/x")
			if (err == nil) != (tc.err == "") || err != nil && tc.err != "no credentials" && !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("error %v, want one with %q", err, tc.err)
			}
			if runs := h.runs(t)[before:]; tc.err == "" && (len(runs) != 1 || runs[0] != " get < "+reg.Host()) {
				t.Errorf("it ran as %q", runs)
			}
			if out := c.log.String() + fmt.Sprint(err); strings.Contains(out, "s3cr3t") {
				t.Errorf("a secret in %s", out)
			}
		})
	}
}

// mountSecret mounts a secret as the kubelet does: files are links through
// "..data", which is replaced in one step.
func mountSecret(t *testing.T, dir, text string) {
	t.Helper()
	data := filepath.Join(dir, fmt.Sprintf("..%d", time.Now().UnixNano()))
	write(t, filepath.Join(data, ".dockerconfigjson"), text)
	next := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(filepath.Base(data), next); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..data/.dockerconfigjson", filepath.Join(dir, ".dockerconfigjson")); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
}

// TestSecrets rotates a mounted pull secret while a client is in use.
func TestSecrets(t *testing.T) {
	for _, below := range []string{"", "pull-secret"} {
		t.Run("below "+below, func(t *testing.T) {
			reg := private(t, true)
			root := t.TempDir()
			dir := filepath.Join(root, below)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(root, "a-broken-one/.dockerconfigjson"), "s3cr3t")
			write(t, filepath.Join(root, "a-file"), "")
			c := newClient(t, reg, open(t, "", root)...)
			secret := func(password string) string {
				return fmt.Sprintf(`{"auths":{%q:{"username":"user","password":%q}}}`, "https://"+reg.Host()+"/library", password)
			}
			mountSecret(t, dir, secret("old-s3cr3t"))
			if err := c.resolve(t, "library/x"); err == nil {
				t.Error("an old password is taken")
			}
			mountSecret(t, dir, secret("s3cr3t"))
			if err := c.resolve(t, "library/x"); err != nil {
				t.Errorf("after the rotation: %v", err)
			}
			if err := c.resolve(t, "other/y"); err == nil || !strings.Contains(err.Error(), "a-broken-one") || strings.Contains(err.Error(), "s3cr3t") {
				t.Errorf("a repository that the secret is not for: %v", err)
			}
			if strings.Contains(c.log.String(), "s3cr3t") {
				t.Errorf("a secret in the log: %s", &c.log)
			}
		})
	}
}

const providerConfig = `
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: tatami-provider
  matchImages: ["127.0.0.1:PORT", "*.example"]
  defaultCacheDuration: "DEFAULT"
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  args: [get-credentials, --verbose]
  env:
  - {name: HELPER_NAME, value: provider}
`

func answer(key, duration, pattern, password string) string {
	if duration != "" {
		duration = fmt.Sprintf(`"cacheDuration":%q,`, duration)
	}
	return fmt.Sprintf(`{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":%q,%s"auth":{%q:{"username":"user","password":%q}}}`, key, duration, pattern, password)
}

// providers opens the kubelet's file with a real program.
func providers(t *testing.T, h *helper, reg *registrytest.Server, life string) []credentials.Source {
	t.Helper()
	path := filepath.Join(t.TempDir(), "providers.yaml")
	_, port, _ := strings.Cut(reg.Host(), ":")
	write(t, path, strings.NewReplacer("PORT", port, "DEFAULT", life).Replace(providerConfig))
	return open(t, h.bin, path)
}

// TestProvider pulls with a provider of the kubelet, and counts its runs by how
// long and for what its answers are good.
func TestProvider(t *testing.T) {
	h := newHelper(t, "tatami-provider")
	for _, tc := range []struct {
		key, duration, life string
		runs                int // for three repositories of one registry, the first one twice
	}{
		{"Image", "", "1h", 3}, {"Registry", "", "1h", 1}, {"Global", "", "1h", 1},
		{"Registry", "10m", "0s", 1}, {"Registry", "0s", "1h", 4}, {"Registry", "", "0s", 4}, {"Registry", "-1s", "1h", 4},
	} {
		t.Run(fmt.Sprintf("%s %s default %s", tc.key, tc.duration, tc.life), func(t *testing.T) {
			reg := private(t, true)
			h.set(t, "answer", answer(tc.key, tc.duration, reg.Host(), "s3cr3t"))
			before := len(h.runs(t))
			sources := providers(t, h, reg, tc.life)
			for _, repository := range []string{"library/x", "other/y", "library/x"} {
				// A new client has no tokens.
				if err := newClient(t, reg, sources...).resolve(t, repository); err != nil {
					t.Fatal(err)
				}
			}
			if cred, err := sources[0].Credential(t.Context(), reg.Host()+"/third/z"); err != nil || cred.Password != "s3cr3t" {
				t.Errorf("a third repository: %v", err)
			}
			runs := h.runs(t)[before:]
			if len(runs) != tc.runs {
				t.Errorf("the provider ran %d times, want %d", len(runs), tc.runs)
			}
			want := fmt.Sprintf(`provider get-credentials --verbose < {"apiVersion":"credentialprovider.kubelet.k8s.io/v1","image":"%s/library/x","kind":"CredentialProviderRequest"}`, reg.Host())
			if runs[0] != want {
				t.Errorf("it was asked\n%s\nwant\n%s", runs[0], want)
			}
			if cred, err := sources[0].Credential(t.Context(), "unknown.test/x"); cred != auth.EmptyCredential || err != nil {
				t.Errorf("an image that does not match: %v", err)
			}
		})
	}
}

// TestProviderOnce: many that want credentials at a time have one run.
func TestProviderOnce(t *testing.T) {
	h := newHelper(t, "tatami-provider")
	reg := private(t, true)
	h.set(t, "answer", answer("Image", "", reg.Host(), "s3cr3t"))
	h.set(t, "wait", "300ms")
	sources := providers(t, h, reg, "1h")
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			if cred, err := sources[0].Credential(t.Context(), reg.Host()+"/library/x"); err != nil || cred.Password != "s3cr3t" {
				t.Errorf("error %v", err)
			}
		})
	}
	wg.Wait()
	if n := len(h.runs(t)); n != 1 {
		t.Errorf("the provider ran %d times", n)
	}
}

// TestProviderRenewal: an answer is renewed before its end, and stands in for a
// provider that fails meanwhile.
func TestProviderRenewal(t *testing.T) {
	h := newHelper(t, "tatami-provider")
	reg := private(t, true)
	h.set(t, "answer", answer("Registry", "20s", reg.Host(), "s3cr3t"))
	source := providers(t, h, reg, "1h")[0]
	look := func(refused bool) (auth.Credential, error) {
		return source.Credential(kube.WithLookup(t.Context(), reg.Host()+"/library/x", refused), reg.Host())
	}
	if cred, err := look(false); err != nil || cred.Password != "s3cr3t" {
		t.Fatal(err)
	}
	h.set(t, "exit", "")
	kube.Age(source, 16*time.Second)
	if cred, err := look(false); err != nil || cred.Password != "s3cr3t" {
		t.Errorf("while the provider fails: %v", err)
	}
	if _, err := look(true); err == nil {
		t.Error("an answer that was refused is given again")
	}
	h.unset(t, "exit")
	h.set(t, "answer", answer("Registry", "20s", reg.Host(), "new-s3cr3t"))
	if cred, err := look(false); err != nil || cred.Password != "new-s3cr3t" {
		t.Errorf("renewed: %v", err)
	}
	if n := len(h.runs(t)); n != 4 {
		t.Errorf("the provider ran %d times", n)
	}
	for range 5 { // just made: a refusal does not have it run again
		if _, err := look(true); err != nil {
			t.Error(err)
		}
	}
	if n := len(h.runs(t)); n != 4 {
		t.Errorf("the provider ran %d times", n)
	}
	kube.Age(source, 6*time.Second) // still fresh, but old enough to be wrong
	if _, err := look(false); err != nil || len(h.runs(t)) != 4 {
		t.Errorf("a fresh answer: %v, %d runs", err, len(h.runs(t)))
	}
	if _, err := look(true); err != nil || len(h.runs(t)) != 5 {
		t.Errorf("a refused answer: %v, %d runs", err, len(h.runs(t)))
	}
	kube.Age(source, 25*time.Second)
	h.set(t, "exit", "")
	if _, err := look(false); err == nil {
		t.Error("an answer is used after its end")
	}
}

// TestProviderFails has providers that misbehave; no secret gets out.
func TestProviderFails(t *testing.T) {
	h := newHelper(t, "tatami-provider")
	reg := private(t, true)
	good := answer("Image", "", reg.Host(), "s3cr3t")
	for _, tc := range []struct{ name, answer, exit, want string }{
		{"exit status", good, "1", "exit status 1"},
		{"no JSON", "s3cr3t", "", "not JSON"},
		{"other kind", strings.Replace(good, "Response", "Request", 1), "", "not of kind"},
		{"other version", strings.Replace(good, "/v1", "/v1beta1", 1), "", "not of kind"},
		{"no cache key", strings.Replace(good, "Image", "s3cr3t", 1), "", "no cacheKeyType"},
		{"no duration", answer("Image", "s3cr3t", reg.Host(), ""), "", "no duration"},
		{"long", strings.Repeat("s3cr3t", 300_000), "", "longer than"},
		{"no auth", `{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image"}`, "", ""},
		{"auth of others", answer("Image", "", "other.example", "s3cr3t"), "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h.set(t, "answer", tc.answer)
			if tc.exit != "" {
				h.set(t, "exit", "")
				defer h.unset(t, "exit")
			}
			c := newClient(t, reg, providers(t, h, reg, "1h")...)
			err := c.resolve(t, "library/x")
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
			if out := c.log.String() + fmt.Sprint(err); strings.Contains(out, "s3cr3t") {
				t.Errorf("a secret in %s", out)
			}
		})
	}
	t.Run("hangs", func(t *testing.T) {
		h.set(t, "answer", good)
		h.set(t, "wait", "1h")
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := providers(t, h, reg, "1h")[0].Credential(ctx, reg.Host()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
}

func TestProviderConfigMistakes(t *testing.T) {
	for _, tc := range []struct{ name, old, new, want string }{
		{"version of the file", "kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v9", "apiVersion"},
		{"no providers", "providers:", "providers: []\nothers:", "0 providers"},
		{"path as name", "tatami-provider", "../x", "name"},
		{"version of requests", "credentialprovider.kubelet.k8s.io/v1", "v1", "apiVersion"},
		{"no patterns", `["127.0.0.1:PORT", "*.example"]`, "[]", "matchImages"},
		{"bad pattern", `"*.example"`, `"a b%"`, "matchImages"},
		{"no duration", `defaultCacheDuration: "DEFAULT"`, "", "defaultCacheDuration"},
		{"bad duration", "DEFAULT", "soon", "defaultCacheDuration"},
		{"negative duration", "DEFAULT", "-1h", "defaultCacheDuration"},
		{"wrong type", "args: [get-credentials, --verbose]", "args: {a: b}", "cannot be decoded"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.yaml")
			text := strings.ReplaceAll(strings.Replace(providerConfig, tc.old, tc.new, 1), "DEFAULT", "1h")
			write(t, path, strings.ReplaceAll(text, "PORT", "5000"))
			if _, err := kube.Open([]string{path}, "/usr/bin", discard); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
	path := filepath.Join(t.TempDir(), "c.json")
	write(t, path, `{"kind":"CredentialProviderConfig","apiVersion":"kubelet.config.k8s.io/v1beta1","providers":[{"name":"x","matchImages":["*"],"defaultCacheDuration":"0","apiVersion":"credentialprovider.kubelet.k8s.io/v1beta1","tokenAttributes":{"requireServiceAccount":false}}]}`)
	if _, err := kube.Open([]string{path}, "/usr/bin", discard); err != nil {
		t.Errorf("JSON: %v", err)
	}
	if _, err := kube.Open([]string{path}, "", discard); err == nil || !strings.Contains(err.Error(), "bin-dir") {
		t.Errorf("no directory of programs: %v", err)
	}
}
