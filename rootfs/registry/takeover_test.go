package registry

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// TestTakeOverAtEnd has the second request win with the whole blob while the first one
// brought the last bytes: what the second one would bring again is not too much.
func TestTakeOverAtEnd(t *testing.T) {
	r := &Repository{host: "h", name: named(t), client: New(Config{}), last: true}
	rr := newRangeReader(t.Context(), r, piece{kind: "blobs", off: 10, end: 10, size: 10})
	rr.from = r
	second := &second{
		from: r, trip: &trip{avoid: -1}, off: 5, began: time.Now(), cancel: func() {},
		body: io.NopCloser(strings.NewReader("56789")), whole: true,
	}
	if err := rr.takeOver(second); err != nil {
		t.Error(err)
	}
	if err := rr.finish(); err != nil {
		t.Error(err)
	}
}

// TestLateSecond has the second request answered after the wait has ended: the first
// one goes on.
func TestLateSecond(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-4/5")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = io.WriteString(w, "01234") // the client sees what is missing
	}))
	defer server.Close()
	name, err := reference.ParseNormalizedNamed(strings.TrimPrefix(server.URL, "http://") + "/x")
	if err != nil {
		t.Fatal(err)
	}
	c := New(Config{})
	defer c.Close()
	r := c.Repository(name).hosts(CanPull)[0]
	p := piece{kind: "blobs", digest: digest.FromString("01234"), end: 5, size: 5}
	for _, ended := range []bool{false, true} {
		first, over := true, false
		w := &wait{from: r, trip: &trip{avoid: -1}, piece: p, cancel: func() { first = false }}
		s := &second{from: r, trip: &trip{avoid: -1}, cancel: func() { over = true }}
		rr := newRangeReader(t.Context(), r, p)
		if rr.hedge.wait = w; ended {
			rr.hedge.wait = nil
		}
		rr.hedge.race(t.Context(), w, s)
		if first != ended || over != ended || (s.body == nil) != ended {
			t.Errorf("wait ended %v: the first goes on %v, the second is over %v", ended, first, over)
		}
		if s.body != nil {
			_ = s.body.Close() // nothing was written
		}
	}
}

// TestTakeOverInTheMiddle has the first one bring bytes that the second one brings again.
func TestTakeOverInTheMiddle(t *testing.T) {
	r := &Repository{host: "h", name: named(t), client: New(Config{}), last: true}
	rr := newRangeReader(t.Context(), r, piece{kind: "blobs", off: 7, end: 10, size: 10})
	rr.from = r
	s := &second{from: r, trip: &trip{avoid: -1}, off: 5, began: time.Now(), cancel: func() {}, body: io.NopCloser(strings.NewReader("56789"))}
	if err := rr.takeOver(s); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(rr); err != nil || string(got) != "789" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := rr.Close(); err != nil {
		t.Error(err)
	}
}
