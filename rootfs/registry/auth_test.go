package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"oras.land/oras-go/v2/registry/remote/auth"
)

func withPassword(cfg registry.Config, reg *registrytest.Server, password string) registry.Config {
	cfg.Credentials = auth.StaticCredential(reg.Host(), auth.Credential{Username: "user", Password: password})
	return cfg
}

// TestTokenExpiry lets all tokens (and redirect targets) expire twice while
// 200 ranges are read, 16 at a time: each expiry may cost one token.
func TestTokenExpiry(t *testing.T) {
	for _, redirect := range []bool{false, true} {
		t.Run(fmt.Sprintf("redirect %v", redirect), func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{
				Redirect: redirect,
				Auth:     &registrytest.Auth{User: "user", Password: "secret", Delay: 20 * time.Millisecond},
			})
			data := random(1 << 20)
			desc := reg.PushBlob("library/x", "", data)
			repo := repository(t, newClient(t, withPassword(fast(), reg, "secret")), reg)
			// The ranges before an expiry end before the next one: each of them
			// meets one at most.
			var wgs [3]sync.WaitGroup
			slots := make(chan struct{}, 16)
			for i := range 200 {
				wg := &wgs[i/70]
				if i == 70 || i == 140 {
					if i == 140 {
						wgs[0].Wait()
					}
					reg.ExpireTokens()
					reg.ExpireRedirects()
				}
				slots <- struct{}{}
				wg.Go(func() {
					off := int64(i * 5000)
					rc, err := repo.Range(t.Context(), desc.Digest, off, 5000)
					got, err := readAll(t, rc, err)
					if err != nil || !bytes.Equal(got, data[off:off+5000]) {
						t.Errorf("range %d: %v, %d bytes", i, err, len(got))
					}
					<-slots
				})
			}
			for i := range wgs {
				wgs[i].Wait()
			}
			if n := reg.Tokens(); n > 3 {
				t.Errorf("%d tokens were fetched, 3 do", n)
			}
		})
	}
}

// TestTokenRenewal reads for longer than a token is valid: no request may meet
// its end, as the token service says when that is.
func TestTokenRenewal(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{
		Auth: &registrytest.Auth{User: "user", Password: "secret", TTL: 6 * time.Second, TellTTL: true},
	})
	data := random(100_000)
	desc := reg.PushBlob("library/x", "", data)
	var lookups, reads atomic.Int64
	cfg := fast()
	cfg.Credentials = func(ctx context.Context, host string) (auth.Credential, error) {
		if got := registry.LookupOf(ctx).Repository; host != reg.Host() || got != reg.Host()+"/library/x" {
			t.Errorf("credentials are wanted for %s at %s", got, host)
		}
		lookups.Add(1)
		return auth.Credential{Username: "user", Password: "secret"}, nil
	}
	repo := repository(t, newClient(t, cfg), reg)
	var wg sync.WaitGroup
	end := time.Now().Add(9 * time.Second)
	for range 8 {
		wg.Go(func() {
			for time.Now().Before(end) {
				rc, err := repo.Range(t.Context(), desc.Digest, 100, 1000)
				if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, data[100:1100]) {
					t.Errorf("range: %v", err)
				}
				reads.Add(1)
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	without := 0
	for _, r := range reg.Requests("/blobs/") {
		if r.Authorization == "" {
			without++
		}
	}
	// Each reader may have come before the first token, but not after its end.
	refused := int64(len(reg.Requests("/blobs/"))) - reads.Load()
	if n := reg.Tokens(); n < 2 || n > 4 || without > 8 || refused != int64(without) || lookups.Load() != int64(n) {
		t.Errorf("%d tokens, %d lookups, %d requests without one, %d refused", n, lookups.Load(), without, refused)
	}
}

// TestCredentialRotation changes the password of a registry, and later that of
// its clients, whose source answers from a cache unless it is told better.
func TestCredentialRotation(t *testing.T) {
	for _, basic := range []bool{false, true} {
		t.Run(fmt.Sprintf("basic %v", basic), func(t *testing.T) {
			cached, current := "old", "new"
			var refused atomic.Int64
			cfg := fast()
			cfg.Credentials = func(ctx context.Context, _ string) (auth.Credential, error) {
				l := registry.LookupOf(ctx)
				if l.Refused {
					refused.Add(1)
					cached = current
				}
				l.Expires = time.Now().Add(time.Hour)
				return auth.Credential{Username: "user", Password: cached}, nil
			}
			client := newClient(t, cfg)
			for _, password := range []string{"old", "new"} {
				reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: password, Basic: basic}})
				reg.PushImage("library/x", "latest", registrytest.Image{})
				repo := repository(t, client, reg)
				_, err := repo.Resolve(t.Context(), "latest")
				if err != nil {
					t.Errorf("password %s: %v", password, err)
				}
			}
			if n := refused.Load(); n != 1 {
				t.Errorf("%d lookups say that a credential was refused", n)
			}
		})
	}
}

// TestTokenWaiters cancels the request that started a token fetch: those that
// wait for the same token must not notice.
func TestTokenWaiters(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{Delay: 300 * time.Millisecond}})
	desc := reg.PushBlob("library/x", "", random(1000))
	repo := repository(t, newClient(t, fast()), reg)
	first, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := repo.Range(first, desc.Digest, 0, 10); !errors.Is(err, context.Canceled) {
			t.Errorf("the cancelled range gives %v", err)
		}
	})
	for len(reg.Requests("/blobs/")) == 0 {
		time.Sleep(time.Millisecond)
	}
	wg.Go(func() {
		rc, err := repo.Range(t.Context(), desc.Digest, 0, 10)
		if _, err := readAll(t, rc, err); err != nil {
			t.Errorf("the range that waited gives %v", err)
		}
	})
	for len(reg.Requests("/blobs/")) < 2 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()
	if n := reg.Tokens(); n != 1 {
		t.Errorf("%d tokens were fetched", n)
	}
}

// TestCloseEndsTokenFetch closes a client whose token does not come.
func TestCloseEndsTokenFetch(t *testing.T) {
	noLeak(t)
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{Delay: registrytest.Forever}})
	desc := reg.PushBlob("library/x", "", random(1000))
	client := registry.New(fast())
	repo := repository(t, client, reg)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := repo.Range(t.Context(), desc.Digest, 0, 10); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "closed") {
			t.Errorf("error %v", err)
		}
	})
	for len(reg.Requests("/token")) == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// TestStaleToken has a token expire between the token service and its use:
// once is survived, a token that never works is an error.
func TestStaleToken(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{}})
	desc := reg.PushBlob("library/x", "", random(1000))
	withToken := func(r *http.Request) bool { return r.Header.Get("Authorization") != "" }
	reg.FaultFunc(withToken, 1, registrytest.Status(401, "WWW-Authenticate", "Bearer realm=x"))
	repo := repository(t, newClient(t, fast()), reg)
	rc, err := repo.Range(t.Context(), desc.Digest, 0, 10)
	if _, err := readAll(t, rc, err); err != nil {
		t.Error(err)
	}
	reg.Reset()
	reg.FaultFunc(withToken, 0, registrytest.Status(401, "WWW-Authenticate", "Bearer realm=\"http://"+reg.Host()+"/token\""))
	if _, err := repo.Range(t.Context(), desc.Digest, 0, 10); !errdefs.IsUnauthorized(err) {
		t.Errorf("error %v", err)
	}
	if n := len(reg.Requests("/blobs/")); n > 4 {
		t.Errorf("%d requests", n)
	}
}

func TestCredentialsRefused(t *testing.T) {
	for _, basic := range []bool{false, true} {
		t.Run(fmt.Sprintf("basic %v", basic), func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "secret", Basic: basic}})
			reg.PushImage("library/x", "latest", registrytest.Image{})
			good := repository(t, newClient(t, withPassword(fast(), reg, "secret")), reg)
			if _, err := good.Resolve(t.Context(), "latest"); err != nil {
				t.Errorf("the right password: %v", err)
			}
			bad := repository(t, newClient(t, withPassword(fast(), reg, "hunter2")), reg)
			_, err := bad.Resolve(t.Context(), "latest")
			if !errdefs.IsUnauthorized(err) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a wrong password: %v", err)
			}
			before := len(reg.Requests("/v2/"))
			none := repository(t, newClient(t, fast()), reg)
			_, err = none.Resolve(t.Context(), "latest")
			if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), "no credentials are configured for "+reg.Host()) {
				t.Errorf("no password: %v", err)
			}
			if n := len(reg.Requests("/v2/")) - before; n > 2 {
				t.Errorf("%d requests without credentials", n)
			}
		})
	}
}

// TestDockerCredentials reads a config.json, and reads it again after a login.
func TestDockerCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "secret"}})
	reg.PushImage("library/x", "latest", registrytest.Image{})
	cfg := fast()
	cfg.Credentials = registry.DockerCredentials()
	repo := repository(t, newClient(t, cfg), reg)
	if _, err := repo.Resolve(t.Context(), "latest"); !errdefs.IsUnauthorized(err) {
		t.Errorf("without a config.json: %v", err)
	}
	login := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, reg.Host(), base64.StdEncoding.EncodeToString([]byte("user:secret")))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(login), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Resolve(t.Context(), "latest"); err != nil {
		t.Errorf("after a login: %v", err)
	}
}

// TestRedirect checks that a redirect target is asked directly, without the
// credentials, until it refuses.
func TestRedirect(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Redirect: true, Auth: &registrytest.Auth{}})
	data := random(100_000)
	desc := reg.PushBlob("library/x", "", data)
	repo := repository(t, newClient(t, fast()), reg)
	read := func() {
		t.Helper()
		rc, err := repo.Range(t.Context(), desc.Digest, 500, 1000)
		if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, data[500:1500]) {
			t.Fatalf("range: %v, %d bytes", err, len(got))
		}
	}
	read()
	reg.Reset()
	for range 10 {
		read()
	}
	if n := len(reg.Requests("/v2/")); n != 0 {
		t.Errorf("the registry was asked %d times while the target was known", n)
	}
	// A new target that is refused, too, is asked for once more.
	fresh := reg.PushBlob("library/x", "", random(10))
	reg.Fault("/storage/", 1, registrytest.Status(403))
	if _, err := repo.Blob(t.Context(), fresh); err != nil {
		t.Error(err)
	}
	for _, status := range []int{401, 403, 404, 410, 500, 503} {
		reg.Reset()
		reg.Fault("/storage/", 1, registrytest.Status(status))
		read()
		if n := len(reg.Requests("/v2/")); n != 1 {
			t.Errorf("the registry was asked %d times after status %d", n, status)
		}
	}
	reg.ExpireRedirects()
	read()
	for _, r := range reg.Requests("/storage/") {
		if r.Authorization != "" {
			t.Error("the token went to the redirect target")
		}
	}
}

// TestRedirectSecret breaks the redirect target: the error must not hold the
// signature of its URL.
func TestRedirectSecret(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Redirect: true})
	desc := reg.PushBlob("library/x", "", random(1000))
	cfg := fast()
	cfg.RetryMax = -1
	repo := repository(t, newClient(t, cfg), reg)
	for _, effect := range []registrytest.Effect{registrytest.Truncate(0), registrytest.Status(403), registrytest.Status(500)} {
		remove := reg.Fault("/storage/", 0, effect)
		rc, err := repo.Range(t.Context(), desc.Digest, 0, 1000)
		_, err = readAll(t, rc, err)
		if err == nil || strings.Contains(err.Error(), "signature") {
			t.Errorf("error %v", err)
		}
		remove()
	}
	rc, err := repo.Range(t.Context(), desc.Digest, 0, 1000)
	if _, err := readAll(t, rc, err); err != nil {
		t.Fatal(err)
	}
	reg.Close()
	_, err = repo.Range(t.Context(), desc.Digest, 0, 1000)
	if err == nil || strings.Contains(err.Error(), "signature") {
		t.Errorf("error %v", err)
	}
}

// TestTokenServiceElsewhere: the token service of a registry in an internal
// network has a host of its own; the same for a mirror that hands its challenge on.
func TestTokenServiceElsewhere(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "secret"}})
	data := random(1000)
	desc := reg.PushBlob("library/x", "", data)
	next := forward(t, reg.Host(), nil)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(elsewhere{w}, r)
	}))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	cfg := fast()
	cfg.Credentials = auth.StaticCredential(host, auth.Credential{Username: "user", Password: "secret"})
	repo := newClient(t, cfg).Repository(parse(t, host+"/library/x"))
	for range 2 {
		rc, err := repo.Range(t.Context(), desc.Digest, 0, 1000)
		if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("range: %v, %d bytes", err, len(got))
		}
		reg.ExpireTokens()
	}
	if n := len(reg.Requests("/token")); n != 2 {
		t.Errorf("the token service was asked %d times", n)
	}
	for _, r := range reg.Requests("/token") {
		if !strings.HasPrefix(r.Host, "localhost:") || !strings.Contains(r.Query, "service=") {
			t.Errorf("the token service was asked as %s with %s", r.Host, r.Query)
		}
	}
}

// elsewhere gives the token service another name.
type elsewhere struct{ http.ResponseWriter }

func (e elsewhere) WriteHeader(status int) {
	challenge := e.Header().Get("Www-Authenticate")
	if challenge != "" {
		e.Header().Set("Www-Authenticate", strings.Replace(challenge, "127.0.0.1", "localhost", 1))
	}
	e.ResponseWriter.WriteHeader(status)
}
