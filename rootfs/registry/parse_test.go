package registry

import (
	"encoding/json"
	"io"
	"math"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"
	"unicode/utf8"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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
	rr := &rangeReader{ctx: t.Context(), body: body, piece: piece{off: 10, end: 20}}
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
