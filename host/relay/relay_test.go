package relay

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/ociserve"
)

// stock is an Image in memory. With err set, an object's bytes end after good
// of them.
type stock struct {
	objects map[string][]byte // kind + "/" + digest
	refs    []ocispec.Descriptor
	err     error
	good    int64
	opened  atomic.Int64
	waiting atomic.Int64  // in Open
	peak    atomic.Int64  // of waiting
	hold    chan struct{} // when set, Open waits for it

	asked chan context.Context // when set, gets those of Open
}

func (s *stock) put(kind string, data []byte) digest.Digest {
	d := digest.FromBytes(data)
	s.objects[kind+"/"+d.String()] = data
	return d
}

func (s *stock) Find(kind string, d digest.Digest) (ocispec.Descriptor, bool) {
	data, ok := s.objects[kind+"/"+d.String()]
	return ocispec.Descriptor{MediaType: "application/x-" + kind, Digest: d, Size: int64(len(data))}, ok
}

func (s *stock) Open(ctx context.Context, kind string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	s.opened.Add(1)
	if s.asked != nil {
		s.asked <- ctx
	}
	if s.hold != nil {
		now := s.waiting.Add(1)
		defer s.waiting.Add(-1)
		for p := s.peak.Load(); now > p && !s.peak.CompareAndSwap(p, now); p = s.peak.Load() {
		}
		select {
		case <-s.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	data := s.objects[kind+"/"+d.String()][off : off+n]
	if s.err == nil {
		return io.NopCloser(bytes.NewReader(data)), nil
	}
	if s.good == 0 {
		return nil, s.err
	}
	return io.NopCloser(io.MultiReader(bytes.NewReader(data[:s.good]), failing{s.err})), nil
}

func (s *stock) Referrers() []ocispec.Descriptor { return s.refs }

// Of package ociserve.
const (
	manifests = ociserve.Manifests
	blobs     = ociserve.Blobs
	segments  = ociserve.Segments

	piece       = 256 << 10
	headerBytes = 16 << 10
	maxPath     = 1024
)

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// rig is a relay on a socket and a client of it.
type rig struct {
	*Relay
	addr string
	http *http.Client
}

func start(t *testing.T, cfg Config) *rig {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := New(cfg)
	done := make(chan error, 1)
	go func() { done <- r.Serve(l) }()
	t.Cleanup(func() {
		r.Shutdown(t.Context()) // which has ended
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return &rig{r, l.Addr().String(), &http.Client{Transport: &http.Transport{DisableCompression: true}}}
}

// do returns the answer and its body, and the error of reading that.
func (g *rig) do(t *testing.T, method, path string, header ...string) (*http.Response, []byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+g.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := g.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

// code returns the distribution error code of a body.
func code(t *testing.T, body []byte) string {
	t.Helper()
	var e struct {
		Errors []struct{ Code, Message string }
	}
	if err := json.Unmarshal(body, &e); err != nil || len(e.Errors) != 1 || e.Errors[0].Message == "" {
		t.Fatalf("not an error body: %q (%v)", body, err)
	}
	return e.Errors[0].Code
}

func random(n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(p) // never fails
	return p
}

// shop has one image with one object of each kind.
func shop() (s *stock, manifest, blob, segment digest.Digest) {
	s = &stock{objects: map[string][]byte{}}
	manifest = s.put(manifests, []byte(`{"schemaVersion":2}`))
	blob = s.put(blobs, random(1000))
	segment = s.put(segments, random(3*piece+17))
	s.refs = []ocispec.Descriptor{{ArtifactType: "a/b", Size: 1}, {ArtifactType: "c/d", Size: 2}}
	return s, manifest, blob, segment
}

func grants(repository, tag string, manifest digest.Digest, s *stock) func() []Grant {
	return func() []Grant {
		return []Grant{{Domain: "docker.io", Repository: repository, Tag: tag, Manifest: manifest, Image: s}}
	}
}

func TestObjects(t *testing.T) {
	s, manifest, blob, segment := shop()
	var sent atomic.Int64
	g := start(t, Config{Grants: grants("library/debian", "12", manifest, s), Sent: &sent})
	want := int64(0)
	for _, tc := range []struct {
		path string
		key  string
	}{
		{"manifests/" + manifest.String(), manifests + "/" + manifest.String()},
		{"manifests/12", manifests + "/" + manifest.String()},
		{"manifests/12?ns=docker.io", manifests + "/" + manifest.String()},
		{"blobs/" + blob.String(), blobs + "/" + blob.String()},
		{"segments/" + segment.String(), segments + "/" + segment.String()},
	} {
		data := s.objects[tc.key]
		resp, body, err := g.do(t, "GET", "/v2/library/debian/"+tc.path)
		if err != nil || resp.StatusCode != 200 || !bytes.Equal(body, data) {
			t.Fatalf("%s: %s, %d bytes, %v", tc.path, resp.Status, len(body), err)
		}
		want += int64(len(data))
		if d := resp.Header.Get("Docker-Content-Digest"); !strings.HasSuffix(tc.key, d) || d == "" {
			t.Errorf("%s: digest header %q", tc.path, d)
		}
		resp, body, err = g.do(t, "HEAD", "/v2/library/debian/"+tc.path)
		if err != nil || resp.StatusCode != 200 || resp.ContentLength != int64(len(data)) || len(body) != 0 {
			t.Errorf("HEAD %s: %s, length %d, %v", tc.path, resp.Status, resp.ContentLength, err)
		}
	}
	if sent.Load() != want {
		t.Errorf("counted %d bytes, sent %d", sent.Load(), want)
	}
	if resp, body, _ := g.do(t, "GET", "/v2/"); resp.StatusCode != 200 || string(body) != "{}" {
		t.Errorf("/v2/: %s %q", resp.Status, body)
	}
}

func TestRefusals(t *testing.T) {
	s, manifest, blob, segment := shop()
	g := start(t, Config{Grants: grants("library/debian", "12", manifest, s)})
	other := digest.FromString("other").String()
	for _, tc := range []struct {
		method, path string
		status       int
		code         string
	}{
		{"GET", "/v2/library/alpine/manifests/" + manifest.String(), 403, "DENIED"},
		{"GET", "/v2/library/alpine/blobs/" + blob.String(), 403, "DENIED"},
		{"GET", "/v2/library/alpine/segments/" + segment.String(), 403, "DENIED"},
		{"GET", "/v2/library/alpine/referrers/" + manifest.String(), 403, "DENIED"},
		{"GET", "/v2/debian/manifests/12", 403, "DENIED"},
		{"GET", "/v2/library/debian/manifests/12?ns=quay.io", 403, "DENIED"},
		{"GET", "/v2/library/debian/manifests/13", 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/library/debian/manifests/" + other, 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/library/debian/manifests/" + blob.String(), 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/library/debian/blobs/" + other, 404, "BLOB_UNKNOWN"},
		{"GET", "/v2/library/debian/blobs/" + segment.String(), 404, "BLOB_UNKNOWN"},
		{"GET", "/v2/library/debian/segments/" + blob.String(), 404, "BLOB_UNKNOWN"},
		{"GET", "/v2/library/debian/referrers/12", 400, "DIGEST_INVALID"},
		{"GET", "/v2/library/debian/blobs/12", 400, "DIGEST_INVALID"},
		{"GET", "/v2/library/debian/manifests/sha256:00", 400, "DIGEST_INVALID"},
		{"GET", "/v2/library/debian/manifests/md5:d41d8cd98f00b204e9800998ecf8427e", 400, "DIGEST_INVALID"},
		{"GET", "/v2/library/debian/tags/list", 404, "UNSUPPORTED"},
		{"GET", "/v2/_catalog", 404, "UNSUPPORTED"},
		{"GET", "/v2//manifests/12", 404, "UNSUPPORTED"},
		{"GET", "/v2/manifests/12", 404, "UNSUPPORTED"},
		{"GET", "/v2/library/debian/manifests/", 404, "UNSUPPORTED"},
		{"GET", "/", 404, "UNSUPPORTED"},
		{"GET", "/v2/../../etc/passwd", 404, "UNSUPPORTED"},
		{"GET", "/v2/" + strings.Repeat("a", maxPath) + "/manifests/12", 404, "UNSUPPORTED"},
		{"PUT", "/v2/library/debian/manifests/12", 405, "UNSUPPORTED"},
		{"DELETE", "/v2/library/debian/blobs/" + blob.String(), 405, "UNSUPPORTED"},
		{"POST", "/v2/library/debian/blobs/uploads/", 405, "UNSUPPORTED"},
	} {
		resp, body, err := g.do(t, tc.method, tc.path)
		if err != nil || resp.StatusCode != tc.status || code(t, body) != tc.code {
			t.Errorf("%s %s: %s %s, want %d %s", tc.method, tc.path, resp.Status, body, tc.status, tc.code)
		}
	}
	if n := s.opened.Load(); n != 0 {
		t.Errorf("%d objects were opened for refused requests", n)
	}
}

func TestReferrers(t *testing.T) {
	s, manifest, _, _ := shop()
	g := start(t, Config{Grants: grants("a", "", manifest, s)})
	none := digest.FromString("none").String()
	for path, want := range map[string]string{
		manifest.String(): "[a/b c/d]", manifest.String() + "?artifactType=c/d": "[c/d]", manifest.String() + "?artifactType=x": "[]", none: "[]",
	} {
		resp, body, _ := g.do(t, "GET", "/v2/a/referrers/"+path)
		var ix ocispec.Index
		if err := json.Unmarshal(body, &ix); err != nil || resp.Header.Get("Content-Type") != ocispec.MediaTypeImageIndex {
			t.Fatalf("%q: %v, %s", path, err, body)
		}
		got := []string{}
		for _, d := range ix.Manifests {
			got = append(got, d.ArtifactType)
		}
		if fmt.Sprint(got) != want || strings.Contains(path, "?") != (resp.Header.Get("OCI-Filters-Applied") == "artifactType") {
			t.Errorf("%q: %v, want %s", path, got, want)
		}
	}
}

func TestRanges(t *testing.T) {
	s, manifest, blob, _ := shop()
	g := start(t, Config{Grants: grants("a", "", manifest, s)})
	data := s.objects[blobs+"/"+blob.String()] // 1000 bytes
	for _, tc := range []struct {
		header   string
		status   int
		from, to int
	}{
		{"bytes=0-0", 206, 0, 1},
		{"bytes=0-999", 206, 0, 1000},
		{"bytes=10-19", 206, 10, 20},
		{"bytes=990-", 206, 990, 1000},
		{"bytes=990-5000", 206, 990, 1000},
		{"bytes=-10", 206, 990, 1000},
		{"bytes=-5000", 206, 0, 1000},
		{"bytes=5-9223372036854775807", 206, 5, 1000},
		{"bytes=1000-", 416, 0, 0},
		{"bytes=9223372036854775807-", 416, 0, 0},
		{"bytes=-0", 416, 0, 0},
		{"bytes=5-9223372036854775808", 400, 0, 0},
		{"bytes=18446744073709551615-1", 400, 0, 0},
		{"bytes=5-4", 400, 0, 0},
		{"bytes=-", 400, 0, 0},
		{"bytes=", 400, 0, 0},
		{"bytes=--1", 400, 0, 0},
		{"bytes=-1-5", 400, 0, 0},
		{"bytes=+1-5", 400, 0, 0},
		{"bytes=0x1-5", 400, 0, 0},
		{"bytes= 1-5", 400, 0, 0},
		{"bytes=0-1,3-4", 400, 0, 0},
		{"bytes=" + strings.Repeat("0-0,", 2000) + "0-0", 400, 0, 0},
		{"chunks=0-1", 400, 0, 0},
		{"", 400, 0, 0},
	} {
		resp, body, err := g.do(t, "GET", "/v2/a/blobs/"+blob.String(), "Range", tc.header)
		if err != nil || resp.StatusCode != tc.status {
			t.Errorf("%q: %s, %v, want %d", tc.header, resp.Status, err, tc.status)
			continue
		}
		if tc.status != 206 {
			code(t, body)
			continue
		}
		span := fmt.Sprintf("bytes %d-%d/1000", tc.from, tc.to-1)
		if !bytes.Equal(body, data[tc.from:tc.to]) || resp.Header.Get("Content-Range") != span {
			t.Errorf("%q: %d bytes, %q, want %q", tc.header, len(body), resp.Header.Get("Content-Range"), span)
		}
	}
	if resp, _, _ := g.do(t, "GET", "/v2/a/blobs/"+blob.String(), "Range", "bytes=0-1", "Range", "bytes=3-4"); resp.StatusCode != 400 {
		t.Errorf("two headers: %s", resp.Status)
	}
	resp, _, _ := g.do(t, "GET", "/v2/a/blobs/"+blob.String(), "X", strings.Repeat("x", 4*headerBytes))
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("large header: %s", resp.Status)
	}
}

// A source that fails before the first byte is an error answer; one that fails
// later must not look like a whole answer.
func TestFailingSource(t *testing.T) {
	for _, tc := range []struct {
		name   string
		err    error
		good   int64
		status int
	}{
		{"registry down", fmt.Errorf("dial: %w", errdefs.ErrUnavailable), 0, 503},
		{"corrupt", fmt.Errorf("verify: %w", errdefs.ErrDataLoss), 0, 502},
		{"gone", fmt.Errorf("blob: %w", errdefs.ErrNotFound), 0, 404},
		{"other", errors.New("secret.internal refused"), 0, 503},
		{"later", errdefs.ErrUnavailable, piece + 5, 200},
		{"short", io.EOF, piece, 200},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, manifest, _, segment := shop()
			s.err, s.good = tc.err, tc.good
			g := start(t, Config{Grants: grants("a", "", manifest, s)})
			resp, body, err := g.do(t, "GET", "/v2/a/segments/"+segment.String())
			if resp.StatusCode != tc.status {
				t.Fatalf("%s, want %d", resp.Status, tc.status)
			}
			if tc.good > 0 {
				if err == nil || int64(len(body)) > tc.good {
					t.Fatalf("%d bytes and %v: a cut answer looks whole", len(body), err)
				}
				return
			}
			code(t, body)
			if strings.Contains(string(body), "secret") || resp.Header.Get("ETag") != "" {
				t.Errorf("answer %s %v", body, resp.Header)
			}
		})
	}
}

// The node's log says why reads fail, but a guest that asks on and on cannot fill it.
func TestComplaintsAreFew(t *testing.T) {
	s, manifest, blob, segment := shop()
	s.err = errors.New("secret.internal refused")
	var out strings.Builder // written by one connection at a time
	g := start(t, Config{Grants: grants("a", "", manifest, s), Log: slog.New(slog.NewTextHandler(&out, nil))})
	for range 50 {
		for _, path := range []string{"/v2/a/segments/" + segment.String(), "/v2/a/blobs/" + blob.String()} {
			if resp, _, _ := g.do(t, "GET", path); resp.StatusCode != 503 {
				t.Fatalf("%s", resp.Status)
			}
		}
	}
	g.Shutdown(t.Context())
	if n := strings.Count(out.String(), "\n"); n != 2 || strings.Count(out.String(), "secret.internal") != 2 {
		t.Errorf("%d lines for two objects:\n%s", n, out.String())
	}
}

// A guest that stops reading loses its connection, and with it the slot.
func TestSlowReader(t *testing.T) {
	s, manifest, blob, _ := shop()
	large := s.put(segments, random(64<<20)) // more than socket buffers hold
	g := start(t, Config{Grants: grants("a", "", manifest, s), Requests: 1, Stall: 200 * time.Millisecond})
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET /v2/a/segments/%s HTTP/1.1\r\nHost: x\r\n\r\n", large); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	// The only slot is taken: this waits until the stalled one is thrown out.
	if resp, _, err := g.do(t, "GET", "/v2/a/blobs/"+blob.String()); err != nil || resp.StatusCode != 200 {
		t.Fatalf("after a stall: %s, %v", resp.Status, err)
	}
	n, err := io.Copy(io.Discard, conn)
	if n+100 >= 64<<20 {
		t.Fatalf("the stalled connection got all %d bytes (%v)", n, err)
	}
}

// A guest that reads slowly, but reads, gets everything, however long it takes.
func TestPatientReader(t *testing.T) {
	s, manifest, _, _ := shop()
	large := s.put(segments, random(24<<20))
	g := start(t, Config{Grants: grants("a", "", manifest, s), Stall: 500 * time.Millisecond})
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+g.addr+"/v2/a/segments/"+large.String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := g.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	sum := digest.Canonical.Digester()
	for began := time.Now(); err == nil; {
		_, err = io.CopyN(sum.Hash(), resp.Body, 512<<10)
		if time.Since(began) < 1500*time.Millisecond { // three stalls
			time.Sleep(25 * time.Millisecond)
		}
	}
	if !errors.Is(err, io.EOF) || sum.Digest() != large {
		t.Fatalf("the end: %v; digest right: %v", err, sum.Digest() == large)
	}
}

// No more requests are served at a time than allowed; the others wait and are
// answered, and a waiting guest that leaves takes nothing.
func TestSlots(t *testing.T) {
	s, manifest, blob, _ := shop()
	s.hold = make(chan struct{})
	g := start(t, Config{Grants: grants("a", "", manifest, s), Requests: 2})
	const clients = 6
	done := make(chan int, clients)
	for range clients {
		go func() {
			resp, _, _ := g.do(t, "GET", "/v2/a/blobs/"+blob.String())
			done <- resp.StatusCode
		}()
	}
	for s.waiting.Load() < 2 {
		time.Sleep(time.Millisecond)
	}
	for range clients {
		s.hold <- struct{}{} // lets one through
		if status := <-done; status != 200 {
			t.Fatalf("status %d", status)
		}
	}
	if n := s.peak.Load(); n != 2 {
		t.Fatalf("%d requests were served at a time, want 2", n)
	}
}

func TestShutdownBreaksOff(t *testing.T) {
	s, manifest, blob, _ := shop()
	s.hold = make(chan struct{})
	g := start(t, Config{Grants: grants("a", "", manifest, s)})
	done := make(chan error, 1)
	go func() {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+g.addr+"/v2/a/blobs/"+blob.String(), nil)
		resp, err := g.http.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		done <- err
	}()
	for s.opened.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g.Shutdown(ctx)
	if err := <-done; err == nil {
		t.Fatal("an answer came after the end")
	}
}
