package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

func TestParseContentRange(t *testing.T) {
	for _, tc := range []struct {
		in                 string
		first, last, total int64
		ok                 bool
	}{
		{"bytes 0-9/10", 0, 9, 10, true},
		{"bytes 5-5/*", 5, 5, -1, true},
		{"bytes 0-9/9", 0, 0, 0, false},
		{"bytes 9-0/10", 0, 0, 0, false},
		{"bytes -5-9/10", 0, 0, 0, false},
		{"bytes +5-9/10", 0, 0, 0, false},
		{"bytes */10", 0, 0, 0, false},
		{"bytes 0-9223372036854775807/*", 0, 0, 0, false},
		{"items 0-9/10", 0, 0, 0, false},
		{"", 0, 0, 0, false},
	} {
		first, last, total, err := parseContentRange(tc.in)
		if first != tc.first || last != tc.last || total != tc.total || (err == nil) != tc.ok {
			t.Errorf("%q: %d-%d/%d, %v", tc.in, first, last, total, err)
		}
	}
}

func TestCheckPartial(t *testing.T) {
	r := &Repository{host: "h", name: named(t)}
	for value, ok := range map[string]bool{
		"bytes 10-19/100": true, "bytes 10-19/*": true, "bytes 10-15/100": true,
		"bytes 10-20/100": false, "bytes 9-19/100": false, "bytes 11-19/100": false,
		"bytes 10-19/99": false, "bytes 10-12/13": false, "": false,
	} {
		resp := &http.Response{Header: http.Header{"Content-Range": {value}}}
		err := r.checkPartial(piece{kind: "blobs", off: 10, end: 20, size: 100}, resp)
		if (err == nil) != ok {
			t.Errorf("%q: %v", value, err)
		}
		resp.Header.Set("Content-Encoding", "gzip")
		if r.checkPartial(piece{kind: "blobs", off: 10, end: 20, size: 100}, resp) == nil {
			t.Errorf("%q of a compressed transfer was accepted", value)
		}
	}
}

func named(t *testing.T) reference.Named {
	t.Helper()
	name, err := reference.ParseNormalizedNamed("x")
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// TestTokenCacheReuse has a request come back with a token that another one
// has replaced meanwhile.
func TestTokenCacheReuse(t *testing.T) {
	c := newTokenCache(&atomic.Int64{})
	defer c.close()
	refused := func() context.Context { return context.WithValue(t.Context(), attemptKey{}, &attempt{}) }
	fetches := 0
	set := func(ctx context.Context) {
		t.Helper()
		want := fmt.Sprint("token ", fetches)
		got, err := c.Set(ctx, "h", auth.SchemeBearer, "s", func(context.Context) (string, error) {
			fetches++
			want = fmt.Sprint("token ", fetches)
			return want, nil
		})
		if got != want || err != nil {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	a, b := refused(), refused()
	set(a)
	if _, err := c.GetToken(b, "h", auth.SchemeBearer, "s"); err != nil {
		t.Error(err)
	}
	set(a) // refused with the token of its own fetch
	set(b) // refused with the token before that
	if fetches != 2 {
		t.Errorf("%d fetches", fetches)
	}
}

// TestTokenCacheClose ends a fetch by its context.
func TestTokenCacheClose(t *testing.T) {
	c := newTokenCache(&atomic.Int64{})
	started := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := c.Set(t.Context(), "h", auth.SchemeBearer, "s", func(ctx context.Context) (string, error) {
			close(started)
			<-ctx.Done()
			if !errors.Is(ctx.Err(), context.Canceled) {
				t.Errorf("the fetch ended with %v", ctx.Err())
			}
			return "", ctx.Err()
		})
		if !errors.Is(err, errClosed) {
			t.Errorf("error %v", err)
		}
	})
	<-started
	c.close()
	wg.Wait()
}

// TestTimeoutIsNotTheCallers has connections with deadlines of their own.
func TestTimeoutIsNotTheCallers(t *testing.T) {
	r := &Repository{host: "h", name: named(t), client: New(Config{})}
	for _, err := range []error{
		r.bodyError("blob", os.ErrDeadlineExceeded), r.bodyError("blob", context.Canceled),
		r.sendError("blob", &url.Error{Op: "Get", URL: "http://h/?s=secret", Err: context.DeadlineExceeded}),
	} {
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || !errdefs.IsUnavailable(err) {
			t.Errorf("error %v", err)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"": -1, "0": 0, "7": 7 * time.Second, "-1": -1, "1.5": -1, "99999999999": -1,
		now.Add(time.Minute).Format(http.TimeFormat): time.Minute,
		now.Add(-time.Hour).Format(http.TimeFormat):  0,
	} {
		if got := retryAfter(in, now); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestNextPage(t *testing.T) {
	for in, want := range map[string]string{
		"": "",
		`</v2/x/referrers/d?last=5&n=1>; rel="next"`:              "last=5&n=1",
		`<https://elsewhere.example/?last=5>; rel=next`:           "last=5",
		`<?last=1>; rel="prev", <?last=2>; title="x"; rel="next"`: "last=2",
		`</v2/x>; rel="next"`:                                     "",
		`<?last=1>`:                                               "", `?last=1; rel="next"`: "", `<:%zz?x>; rel="next"`: "",
	} {
		if got := nextPage(in).Encode(); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestReadKeepsBytesBeforeError has a body that gives its last bytes together
// with an error, as an io.Reader may.
func TestReadKeepsBytesBeforeError(t *testing.T) {
	body := io.NopCloser(iotest.DataErrReader(strings.NewReader("abc")))
	r := &Repository{client: New(Config{}), host: "h", name: named(t), last: true}
	rr := newRangeReader(t.Context(), r, piece{off: 10, end: 20})
	rr.from, rr.body, rr.cancel = r, body, func() {}
	p := make([]byte, 10)
	n, err := rr.Read(p)
	if string(p[:n]) != "abc" || err != nil || rr.piece.off != 13 || rr.body != nil {
		t.Errorf("%q, %v, at %d", p[:n], err, rr.piece.off)
	}
}

// FuzzAnswers feeds everything that is parsed out of a registry's answers.
func FuzzAnswers(f *testing.F) {
	index, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{ocispec.DescriptorEmptyJSON}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("bytes 0-9/10", `<?last=1>; rel="next"`, "7", []byte(`{"errors":[{"code":"DENIED","message":"no\nway"}]}`))
	f.Add("bytes 1-2/*", `<a>; rel=next, <b>`, "Wed, 21 Oct 2015 07:28:00 GMT", index)
	f.Fuzz(func(t *testing.T, contentRange, link, after string, body []byte) {
		first, last, total, err := parseContentRange(contentRange)
		if err == nil && (first < 0 || last < first || last == math.MaxInt64 || total >= 0 && last >= total) {
			t.Errorf("%q: %d-%d/%d", contentRange, first, last, total)
		}
		_ = nextPage(link)
		if d := retryAfter(after, time.Now()); d < -1 {
			t.Errorf("%q: wait %s", after, d)
		}
		code, message := parseErrorBody(body)
		for _, s := range []string{code, message} {
			if len(s) > maxErrorText || strings.ContainsAny(s, "\n\r\x1b\x00") || !utf8.ValidString(s) {
				t.Errorf("error text %q", s)
			}
		}
		list, err := decodeReferrers(body)
		for _, d := range list {
			if err == nil && (d.Digest.Validate() != nil || d.Size <= 0) {
				t.Errorf("descriptor %+v", d)
			}
		}
		if s := sniff(body, "served"); s == "" {
			t.Error("no media type")
		}
	})
}
