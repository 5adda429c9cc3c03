package ociserve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// filed is a body in a file.
type filed struct {
	f        *os.File
	at, left int64
	limit    int64 // of one Map; 0 is none
	fails    error // of Sent
	mapped   *atomic.Int64
}

func (b *filed) Read(p []byte) (int, error) {
	n, err := b.f.ReadAt(p[:min(int64(len(p)), b.left)], b.at)
	b.at += int64(n)
	b.left -= int64(n)
	return n, err
}

func (b *filed) Close() error { return nil }

func (b *filed) Map() (*os.File, int64, int64) {
	if b.limit > 0 {
		return b.f, b.at, min(b.left, b.limit)
	}
	return b.f, b.at, b.left
}

func (b *filed) Sent(n int64) error {
	b.at += n
	b.left -= n
	b.mapped.Add(n)
	return b.fails
}

// copied is a body without a file.
type copied struct{ io.ReadCloser }

// shop is a server of one file at any path.
type shop struct {
	*Server
	data   []byte
	desc   ocispec.Descriptor
	file   *os.File
	mapped atomic.Int64 // bytes that were sent from the file
	body   func(off, n int64) io.ReadCloser
}

func open(t testing.TB, size int) *shop {
	t.Helper()
	s := &shop{data: make([]byte, size)}
	_, _ = rand.NewChaCha8([32]byte{1}).Read(s.data) // never fails
	path := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(path, s.data, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	s.file = f
	s.desc = ocispec.Descriptor{MediaType: "a/b", Digest: digest.FromBytes(s.data), Size: int64(size)}
	s.body = func(off, n int64) io.ReadCloser {
		return &filed{f: s.file, at: off, left: n, mapped: &s.mapped}
	}
	s.Server = New(Config{Stall: 500 * time.Millisecond, Answer: func(w http.ResponseWriter, req *http.Request) error {
		return s.Object(w, req, Blobs, s.desc, func(_ context.Context, off, n int64) (io.ReadCloser, error) { return s.body(off, n), nil })
	}})
	return s
}

// serve listens and returns a client.
func (s *shop) serve(t testing.TB, network string) (client *http.Client, addr string) {
	t.Helper()
	addr = "127.0.0.1:0"
	if network == "unix" {
		addr = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	addr = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Shutdown(t.Context())
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true}}, addr
}

// quiet waits until nothing is answered.
func (s *shop) quiet(t testing.TB) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); len(s.slots) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a request is answered for ever")
		}
	}
}

func get(t testing.TB, client *http.Client, ranges string) ([]byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://x/v2/a/blobs/b", nil)
	if err != nil {
		t.Fatal(err)
	}
	if ranges != "" {
		req.Header.Set("Range", ranges)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

func TestFromFile(t *testing.T) {
	const size = 5<<20 + 17
	for _, network := range []string{"tcp", "unix"} {
		for _, tc := range []struct {
			ranges  string
			off, n  int
			limit   int64
			atLeast int64 // bytes sent from the file
		}{
			{"", 0, size, 0, size - minSpan},
			{"bytes=12345-", 12345, size - 12345, 0, size - 12345 - minSpan},
			{"bytes=4096-1052671", 4096, 1 << 20, 0, 1 << 20},
			{"bytes=7-106", 7, 100, 0, 0},
			{"", 0, size, minSpan - 1, 0}, // too little at a time
			{"", 0, size, 3 * minSpan, size - 3*minSpan},
		} {
			t.Run(fmt.Sprintf("%s/%s/%d", network, tc.ranges, tc.limit), func(t *testing.T) {
				s := open(t, size)
				s.body = func(off, n int64) io.ReadCloser {
					return &filed{f: s.file, at: off, left: n, limit: tc.limit, mapped: &s.mapped}
				}
				client, _ := s.serve(t, network)
				for range 2 { // the second one on the same connection
					if got, err := get(t, client, tc.ranges); err != nil || !bytes.Equal(got, s.data[tc.off:tc.off+tc.n]) {
						t.Fatalf("%d bytes, right: %v, %v", len(got), bytes.Equal(got, s.data[tc.off:tc.off+tc.n]), err)
					}
				}
				s.quiet(t) // it counts what it has sent
				if got := s.mapped.Load(); got < 2*tc.atLeast || tc.atLeast == 0 && got != 0 {
					t.Errorf("%d bytes were sent from the file", got)
				}
				if got := s.cfg.Sent.Load(); got != int64(2*tc.n) {
					t.Errorf("%d bytes counted", got)
				}
			})
		}
	}
}

// An answer whose bytes went while they were sent, or whose file ends early, does not
// look whole.
func TestFileChanges(t *testing.T) {
	s := open(t, 3<<20)
	client, _ := s.serve(t, "tcp")
	s.body = func(off, n int64) io.ReadCloser {
		return &filed{f: s.file, at: off, left: n, mapped: &s.mapped, fails: errors.New("gone")}
	}
	if got, err := get(t, client, ""); err == nil {
		t.Errorf("%d bytes and no error", len(got))
	}
	s.body = func(off, n int64) io.ReadCloser {
		return &filed{f: s.file, at: off + 1<<20, left: n, mapped: &s.mapped}
	}
	if got, err := get(t, client, ""); err == nil {
		t.Errorf("%d bytes of a short file and no error", len(got))
	}
}

// closing is a body whose file is closed before it can be sent; it reads from another.
type closing struct{ *filed }

func (c closing) Map() (*os.File, int64, int64) {
	f, err := os.Open(c.f.Name())
	if err != nil {
		return nil, 0, 0
	}
	f.Close()
	return f, c.at, c.left
}

func TestFileClosed(t *testing.T) {
	s := open(t, 1<<20)
	s.body = func(off, n int64) io.ReadCloser {
		return closing{&filed{f: s.file, at: off, left: n, mapped: &s.mapped}}
	}
	client, _ := s.serve(t, "tcp")
	if got, err := get(t, client, ""); err != nil || !bytes.Equal(got, s.data) || s.mapped.Load() != 0 {
		t.Errorf("%d bytes, %v, %d from the file", len(got), err, s.mapped.Load())
	}
}

// A client that stops reading is thrown out here, too.
func TestStalledFile(t *testing.T) {
	s := open(t, 64<<20) // more than socket buffers hold
	_, addr := s.serve(t, "tcp")
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := fmt.Fprint(c, "GET /v2/a/blobs/b HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for len(s.slots) == 0 || s.mapped.Load() == 0 {
		if time.Now().After(deadline) {
			t.Fatal("nothing is sent")
		}
		time.Sleep(time.Millisecond)
	}
	for len(s.slots) > 0 {
		if time.Now().After(deadline) {
			t.Fatal("the stalled client keeps its slot")
		}
		time.Sleep(time.Millisecond)
	}
}
