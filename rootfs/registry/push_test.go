package registry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// describe is the descriptor of a blob.
func describe(data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: "application/x", Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// once hides that a reader can seek.
type once struct{ io.Reader }

// mustHave reads a blob back.
func mustHave(t *testing.T, repo *registry.Repository, data []byte) {
	t.Helper()
	if has, err := repo.Has(t.Context(), describe(data)); err != nil || !has {
		t.Errorf("has: %v, %v", has, err)
	}
	if got, err := repo.Blob(t.Context(), describe(data)); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read back %d bytes: %v", len(got), err)
	}
}

func TestPush(t *testing.T) {
	for name, opts := range map[string]registrytest.Options{
		"plain":          {},
		"token":          {Auth: &registrytest.Auth{User: "user", Password: "secret"}},
		"basic":          {Auth: &registrytest.Auth{User: "user", Password: "secret", Basic: true}},
		"TLS, anonymous": {TLS: true, Auth: &registrytest.Auth{}},
		"redirect":       {Redirect: true},
	} {
		t.Run(name, func(t *testing.T) {
			reg := registrytest.Start(t, opts)
			cfg := fast()
			if opts.Auth != nil && opts.Auth.User != "" {
				cfg = withPassword(cfg, reg, "secret")
			}
			if opts.TLS {
				cfg.TLS, cfg.PlainHTTP = reg.TLSConfig(), func(string) bool { return false }
			}
			repo := repository(t, newClient(t, cfg), reg)
			known, streamed := random(300_000), random(200_001)
			if has, err := repo.Has(t.Context(), describe(known)); err != nil || has {
				t.Errorf("has before: %v, %v", has, err)
			}
			if err := repo.PushBlob(t.Context(), describe(known), once{bytes.NewReader(known)}); err != nil {
				t.Fatal(err)
			}
			desc, err := repo.PushStream(t.Context(), "application/x", once{bytes.NewReader(streamed)})
			if err != nil || desc.Digest != describe(streamed).Digest || desc.Size != int64(len(streamed)) || desc.MediaType != "application/x" {
				t.Fatalf("pushed %+v, %v", desc, err)
			}
			if opts.Auth != nil && !opts.Auth.Basic && reg.Tokens() != 1 {
				t.Errorf("%d tokens were asked for", reg.Tokens())
			}
			mustHave(t, repo, known)
			mustHave(t, repo, streamed)
		})
	}
}

// TestPushSurvives lets single requests of an upload fail.
func TestPushSurvives(t *testing.T) {
	data := random(3 << 20)
	post := func(r *http.Request) bool { return r.Method == http.MethodPost }
	put := func(r *http.Request) bool { return r.Method == http.MethodPut }
	patch := func(r *http.Request) bool { return r.Method == http.MethodPatch }
	for _, tc := range []struct {
		name   string
		match  func(*http.Request) bool
		effect registrytest.Effect
		once   bool // also from a reader that cannot seek
	}{
		{"busy at the begin", post, registrytest.Status(503), true},
		{"limit at the begin", post, registrytest.Status(429, "Retry-After", "0"), true},
		{"busy at the end", put, registrytest.Status(502), false},
		{"lost at the end", put, registrytest.Truncate(1 << 20), false},
		{"lost in the stream", patch, registrytest.Truncate(1 << 20), false},
		{"busy in the stream", patch, registrytest.Status(500), false},
		{"forgotten", put, registrytest.Status(404), false},
		{"token expired", put, registrytest.Status(401), false},
	} {
		for _, stream := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/stream %v", tc.name, stream), func(t *testing.T) {
				reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "secret"}})
				reg.FaultFunc(tc.match, 1, tc.effect)
				repo := repository(t, newClient(t, withPassword(fast(), reg, "secret")), reg)
				push := func(r io.Reader) (err error) {
					if stream {
						_, err = repo.PushStream(t.Context(), "", r)
						return err
					}
					return repo.PushBlob(t.Context(), describe(data), r)
				}
				err := push(once{bytes.NewReader(data)})
				// An answer that comes before any byte was read harms nobody, and
				// the end of a stream has no body and yet cannot be done again.
				lost := strings.HasPrefix(tc.name, "lost") && (stream || tc.name == "lost at the end")
				if tc.once && err != nil || lost && err == nil {
					t.Errorf("without seeking: %v", err)
				}
				if err != nil && strings.Contains(err.Error(), "secret") {
					t.Errorf("a secret in %v", err)
				}
				reg.FaultFunc(tc.match, 1, tc.effect)
				in := bytes.NewReader(append([]byte("before"), data...))
				if _, err := in.Seek(int64(len("before")), io.SeekStart); err != nil {
					t.Fatal(err)
				}
				if err := push(in); err != nil {
					t.Errorf("with seeking: %v", err)
				}
				mustHave(t, repo, data)
			})
		}
	}
}

func TestPushFails(t *testing.T) {
	data := random(100_000)
	for _, tc := range []struct {
		name   string
		effect registrytest.Effect
		class  func(error) bool
		words  string
	}{
		{"forbidden", registrytest.Status(403), errdefs.IsPermissionDenied, "allow to push"},
		{"read only", registrytest.Status(405), errdefs.IsPermissionDenied, "take pushes"},
		{"too large", registrytest.Status(413), errdefs.IsResourceExhausted, "nothing that large"},
		{"no repository", registrytest.Status(404), errdefs.IsNotFound, "check the name"},
		{"unauthorized", registrytest.Status(401), errdefs.IsUnauthorized, "credentials"},
		{"no server", registrytest.Status(503), errdefs.IsUnavailable, "503"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{})
			reg.Fault("/uploads/", 0, tc.effect)
			repo := repository(t, newClient(t, fast()), reg)
			err := repo.PushBlob(t.Context(), describe(data), bytes.NewReader(data))
			if !tc.class(err) || !strings.Contains(err.Error(), tc.words) || !strings.Contains(err.Error(), describe(data).Digest.String()) {
				t.Errorf("error %v", err)
			}
		})
	}
	t.Run("arguments", func(t *testing.T) {
		repo := repository(t, newClient(t, fast()), registrytest.Start(t, registrytest.Options{}))
		for name, desc := range map[string]ocispec.Descriptor{"digest": {Digest: "sha256:12", Size: 3}, "no digest": {Size: 3}, "size": {Digest: digest.FromString("x"), Size: -1}} {
			if err := repo.PushBlob(t.Context(), desc, strings.NewReader("abc")); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := repo.PushManifest(t.Context(), ocispec.MediaTypeImageManifest, []byte("{}"), "no tag"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("tag: %v", err)
		}
		if _, err := repo.PushManifest(t.Context(), ocispec.MediaTypeImageManifest, make([]byte, registry.MaxManifest+1), "v1"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("large manifest: %v", err)
		}
	})
}

// TestPushSourceFails: an error of what is pushed is not the registry's, and
// neither tried again nor taken for one of a registry that is read from.
func TestPushSourceFails(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	repo := repository(t, newClient(t, fast()), reg)
	data := random(100_000)
	_, cause := repo.Blob(t.Context(), describe([]byte("unknown")))
	if !errdefs.IsNotFound(cause) {
		t.Fatal(cause)
	}
	reg.Reset()
	broken := io.MultiReader(bytes.NewReader(data[:50_000]), errorReader{cause})
	err := repo.PushBlob(t.Context(), describe(data), broken)
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), "read what is to be pushed") {
		t.Errorf("error %v", err)
	}
	if n := len(reg.Requests("/uploads/")); n > 2 {
		t.Errorf("%d requests", n)
	}
}

type errorReader struct{ err error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.err }

// TestPushStalls pushes to a registry that accepts connections and no bytes.
func TestPushStalls(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	reg.FaultFunc(func(r *http.Request) bool { return r.Method == http.MethodPut }, 0, registrytest.Delay(registrytest.Forever))
	cfg := fast()
	cfg.Stall, cfg.RetryMax = 50*time.Millisecond, 1
	repo := repository(t, newClient(t, cfg), reg)
	data := random(32 << 20) // more than the buffers of two sockets
	err := repo.PushBlob(t.Context(), describe(data), bytes.NewReader(data))
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no byte came for too long") {
		t.Errorf("error %v", err)
	}
	if n := len(reg.Requests("/uploads/")); n != 4 {
		t.Errorf("%d requests for two tries", n)
	}
}

func TestMountBlob(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{Auth: &registrytest.Auth{User: "user", Password: "secret"}})
	c := newClient(t, withPassword(fast(), reg, "secret"))
	repo := repository(t, c, reg)
	other, err := reference.ParseNormalizedNamed(reg.Host() + "/library/other")
	if err != nil {
		t.Fatal(err)
	}
	data := random(1000)
	desc := reg.PushBlob("library/other", "", data)
	for _, tc := range []struct {
		name string
		desc ocispec.Descriptor
		from *registry.Repository
		want bool
	}{
		{"there", desc, c.Repository(other), true},
		{"not there", describe([]byte("x")), c.Repository(other), false},
		{"the same", desc, repo, false},
		{"elsewhere", desc, c.Mirror("localhost:1", other), false},
	} {
		if got, err := repo.MountBlob(t.Context(), tc.desc, tc.from); err != nil || got != tc.want {
			t.Errorf("%s: %v, %v", tc.name, got, err)
		}
	}
	mustHave(t, repo, data)
	if err := repo.PushBlob(t.Context(), describe([]byte("x")), strings.NewReader("x")); err != nil {
		t.Error(err)
	}
}

// TestPushReferrers pushes many at the same time; where there is no API they
// all write one tag.
func TestPushReferrers(t *testing.T) {
	for _, without := range []bool{false, true} {
		t.Run(fmt.Sprintf("without API %v", without), func(t *testing.T) {
			reg := registrytest.Start(t, registrytest.Options{NoReferrers: without})
			img := reg.PushImage("library/x", "v1", registrytest.Image{})
			repo := repository(t, newClient(t, fast()), reg)
			subject := ocispec.Descriptor{MediaType: img.Desc.MediaType, Digest: img.Desc.Digest, Size: img.Desc.Size}
			var wg sync.WaitGroup
			const n = 3
			for i := range n {
				wg.Go(func() { pushReferrer(t, repo, subject, fmt.Sprint(i)) })
			}
			wg.Wait()
			pushReferrer(t, repo, subject, "0") // again: listed once
			list, err := repo.Referrers(t.Context(), subject.Digest, wanted)
			if err != nil || len(list) != n {
				t.Fatalf("%d referrers, %v", len(list), err)
			}
			if list[0].ArtifactType != wanted || list[0].Annotations["n"] == "" {
				t.Errorf("listed as %+v", list[0])
			}
			if tagged := len(reg.Requests("/manifests/sha256-")) > 0; tagged != without {
				t.Errorf("the tag was used: %v", tagged)
			}
		})
	}
}

func pushReferrer(t *testing.T, repo *registry.Repository, subject ocispec.Descriptor, n string) {
	t.Helper()
	config := ocispec.DescriptorEmptyJSON
	config.Data, config.MediaType = nil, wanted
	if err := repo.PushBlob(t.Context(), config, strings.NewReader("{}")); err != nil {
		t.Error(err)
	}
	data, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: wanted, Config: config, Layers: []ocispec.Descriptor{config}, Subject: &subject, Annotations: map[string]string{"n": n},
	})
	if err == nil {
		_, err = repo.PushManifest(t.Context(), ocispec.MediaTypeImageManifest, data, "")
	}
	if err != nil {
		t.Error(err)
	}
}

// TestPushElsewhere: the registry sends uploads to another server, which must
// not get to see the credentials. It also takes 128 MiB without holding them.
func TestPushElsewhere(t *testing.T) {
	const size = 128 << 20
	var got digest.Digest
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials were sent elsewhere")
		}
		got, _ = digest.FromReader(r.Body) // compared below
		w.WriteHeader(http.StatusCreated)
	}))
	defer storage.Close()
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, _, _ := r.BasicAuth(); user != "user" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Location", storage.URL+"/x?signature=secret")
		w.WriteHeader(http.StatusAccepted)
	}))
	defer front.Close()
	host := strings.TrimPrefix(front.URL, "http://")
	name, err := reference.ParseNormalizedNamed(host + "/x")
	if err != nil {
		t.Fatal(err)
	}
	cfg := fast()
	cfg.Credentials = auth.StaticCredential(host, auth.Credential{Username: "user", Password: "secret"})
	repo := newClient(t, cfg).Repository(name)
	want, err := digest.FromReader(io.LimitReader(zeros{}, size))
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := repo.PushBlob(t.Context(), ocispec.Descriptor{Digest: want, Size: size}, io.LimitReader(zeros{}, size)); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if got != want {
		t.Errorf("got digest %s, want %s", got, want)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestVerify(t *testing.T) {
	data := random(1000)
	for name, tc := range map[string]struct {
		data []byte
		ok   bool
	}{
		"right": {data, true}, "short": {data[:999], false}, "long": {append(bytes.Clone(data), 1), false},
		"empty": {nil, false}, "other": {append(bytes.Clone(data[:999]), data[999]+1), false},
	} {
		for _, step := range []int{1, 7, 1000, 5000} {
			r := registry.Verify(bytes.NewReader(tc.data), describe(data))
			var got []byte
			var err error
			for err == nil {
				buf := make([]byte, step)
				var n int
				n, err = r.Read(buf)
				got = append(got, buf[:n]...)
			}
			if tc.ok && (!errors.Is(err, io.EOF) || !bytes.Equal(got, data)) || !tc.ok && !errdefs.IsDataLoss(err) {
				t.Errorf("%s in steps of %d: %v", name, step, err)
			}
			if name == "other" && len(got) > 999 {
				t.Errorf("wrong bytes were given out up to the end")
			}
		}
	}
	if _, err := io.ReadAll(registry.Verify(strings.NewReader(""), describe(nil))); err != nil {
		t.Errorf("empty blob: %v", err)
	}
	if _, err := io.ReadAll(registry.Verify(strings.NewReader(""), ocispec.Descriptor{Digest: digest.FromString("x")})); !errdefs.IsDataLoss(err) {
		t.Errorf("empty blob of another digest: %v", err)
	}
}
