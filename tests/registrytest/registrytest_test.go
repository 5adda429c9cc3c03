package registrytest_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

type answer struct {
	status int
	header http.Header
}

// get makes one request; the body is what arrived before an error.
func get(t *testing.T, url, ranges string) (answer, []byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ranges != "" {
		req.Header.Set("Range", ranges)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header}, body, err
}

// TestRanges compares ranges with those of net/http.
func TestRanges(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 10)
	reg := registrytest.Start(t, registrytest.Options{})
	desc := reg.PushBlob("x", "", data)
	oracle := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer oracle.Close()
	for _, ranges := range []string{"", "bytes=0-", "bytes=0-0", "bytes=5-14", "bytes=90-200", "bytes=99-99", "bytes=100-", "bytes=-7", "bytes=-700"} {
		want, wantBody, err := get(t, oracle.URL, ranges)
		if err != nil {
			t.Fatal(err)
		}
		got, body, err := get(t, "http://"+reg.Host()+"/v2/x/blobs/"+desc.Digest.String(), ranges)
		if err != nil || got.status != want.status || got.header.Get("Content-Range") != want.header.Get("Content-Range") {
			t.Errorf("%q: %d %q, want %d %q, %v", ranges, got.status, got.header.Get("Content-Range"), want.status, want.header.Get("Content-Range"), err)
		}
		if want.status < 400 && !bytes.Equal(body, wantBody) {
			t.Errorf("%q: %q, want %q", ranges, body, wantBody)
		}
	}
}

func TestFaults(t *testing.T) {
	data := bytes.Repeat([]byte{'x'}, 200_000)
	reg := registrytest.Start(t, registrytest.Options{})
	desc := reg.PushBlob("x", "", data)
	url := "http://" + reg.Host() + "/v2/x/blobs/" + desc.Digest.String()

	reg.Fault("/blobs/", 1, registrytest.Truncate(100_001))
	if _, body, err := get(t, url, ""); !errors.Is(err, io.ErrUnexpectedEOF) || len(body) != 100_001 {
		t.Errorf("truncated: %d bytes, %v", len(body), err)
	}
	if _, body, err := get(t, url, ""); err != nil || !bytes.Equal(body, data) {
		t.Errorf("after one fault: %d bytes, %v", len(body), err)
	}
	remove := reg.Fault(desc.Digest.String(), 0, registrytest.Corrupt(150_000))
	_, body, err := get(t, url, "bytes=149999-150001")
	if err != nil || string(body) != "x\x87x" {
		t.Errorf("corrupted: %q, %v", body, err)
	}
	remove()
	reg.Fault("", 1, registrytest.Status(429, "Retry-After", "7"))
	if resp, _, _ := get(t, url, ""); resp.status != 429 || resp.header.Get("Retry-After") != "7" {
		t.Errorf("status %d", resp.status)
	}
	reg.Fault("", 1, registrytest.Reset(100_001))
	if _, body, err := get(t, url, ""); !errors.Is(err, syscall.ECONNRESET) || len(body) > 100_001 {
		t.Errorf("reset: %d bytes, %v", len(body), err)
	}
	reg.Fault("", 1, registrytest.Short(7))
	if _, body, err := get(t, url, "bytes=0-99"); err != nil || len(body) != 93 {
		t.Errorf("short: %d bytes, %v", len(body), err)
	}
	reg.Fault("", 1, registrytest.Extra(7))
	if resp, body, err := get(t, url, "bytes=0-99"); err != nil || len(body) != 107 || resp.header.Get("Content-Range") != "bytes 0-99/200000" {
		t.Errorf("extra: %d bytes, %v", len(body), err)
	}
	end := reg.Fault("", 0, registrytest.Loop())
	resp, err := http.Get(url)
	if resp != nil {
		resp.Body.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "stopped after 10 redirects") {
		t.Errorf("loop: %v", err)
	}
	end()
	reg.Reset()
	reg.Fault("", 1, registrytest.Slow(10<<20), registrytest.NoRange())
	if resp, body, err := get(t, url, "bytes=0-9"); err != nil || resp.status != 200 || !bytes.Equal(body, data) {
		t.Errorf("slow, without ranges: %d, %v", resp.status, err)
	}
	if c := reg.BlobStats(desc.Digest); c.Requests != 1 || c.Bytes != int64(len(data)) || c != reg.Total() {
		t.Errorf("counted %+v, %+v", c, reg.Total())
	}
}

// TestCloseEndsStalls closes a registry in the middle of an answer.
func TestCloseEndsStalls(t *testing.T) {
	reg := registrytest.New(registrytest.Options{})
	desc := reg.PushBlob("x", "", make([]byte, 1000))
	reg.Fault("", 0, registrytest.Stall(10, registrytest.Forever))
	done := make(chan struct{})
	go func() {
		defer close(done)
		resp, err := http.Get("http://" + reg.Host() + "/v2/x/blobs/" + desc.Digest.String())
		if err == nil {
			_, _ = io.ReadAll(resp.Body) // ends early
			resp.Body.Close()
		}
	}()
	for len(reg.Requests("")) == 0 {
		time.Sleep(time.Millisecond)
	}
	reg.Close()
	reg.Close()
	<-done
}

func TestLayers(t *testing.T) {
	tarball := registrytest.Must(registrytest.Tar(
		registrytest.Dir("etc", 0o755), registrytest.File("etc/motd", 0o644, "hello"),
		registrytest.Symlink("motd", "etc/motd"), registrytest.Hardlink("etc/issue", "etc/motd"),
	))
	for name, layer := range map[string]registrytest.Layer{
		"uncompressed": registrytest.Uncompressed(tarball),
		"gzip":         registrytest.Must(registrytest.Gzip(tarball)),
		"stored":       registrytest.Must(registrytest.GzipLevel(tarball, gzip.NoCompression)),
		"estargz":      registrytest.Must(registrytest.EStargz(tarball, estargz.WithChunkSize(4))),
	} {
		t.Run(name, func(t *testing.T) {
			var plain io.Reader = bytes.NewReader(layer.Blob)
			if layer.MediaType == ocispec.MediaTypeImageLayerGzip {
				plain = registrytest.Must(gzip.NewReader(plain))
			}
			all := registrytest.Must(io.ReadAll(plain))
			if digest.FromBytes(all) != layer.DiffID {
				t.Error("the diffID is not that of the tar stream")
			}
			if !hasMotd(t, all) {
				t.Error("etc/motd is not in the tar stream")
			}
		})
	}
	l := registrytest.Must(registrytest.EStargz(tarball))
	r := registrytest.Must(estargz.Open(io.NewSectionReader(bytes.NewReader(l.Blob), 0, int64(len(l.Blob)))))
	if _, err := r.VerifyTOC(digest.Digest(l.Annotations[estargz.TOCJSONDigestAnnotation])); err != nil {
		t.Errorf("table of contents: %v", err)
	}
}

func hasMotd(t *testing.T, tarball []byte) bool {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(tarball)); ; {
		h, err := r.Next()
		if err != nil {
			return false
		}
		if h.Name == "etc/motd" {
			return string(registrytest.Must(io.ReadAll(r))) == "hello"
		}
	}
}

// TestImage reads an image back over HTTP.
func TestImage(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	layer := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar())))
	for _, docker := range []bool{false, true} {
		img := reg.PushImage("a/b", fmt.Sprint(docker), registrytest.Image{Layers: []registrytest.Layer{layer}, Docker: docker})
		resp, body, err := get(t, fmt.Sprintf("http://%s/v2/a/b/manifests/%v", reg.Host(), docker), "")
		if err != nil || resp.header.Get("Content-Type") != img.Desc.MediaType || resp.header.Get("Docker-Content-Digest") != img.Desc.Digest.String() {
			t.Errorf("manifest: %v %v", resp.header, err)
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(body, &m); err != nil {
			t.Fatal(err)
		}
		_, config, err := get(t, fmt.Sprintf("http://%s/v2/a/b/blobs/%s", reg.Host(), m.Config.Digest), "")
		var c ocispec.Image
		if err != nil || json.Unmarshal(config, &c) != nil || c.OS != "linux" || c.RootFS.DiffIDs[0] != layer.DiffID {
			t.Errorf("config %s: %v", config, err)
		}
	}
	if resp, _, _ := get(t, "http://"+reg.Host()+"/v2/a/b/manifests/none", ""); resp.status != 404 {
		t.Errorf("unknown tag: %d", resp.status)
	}
}
