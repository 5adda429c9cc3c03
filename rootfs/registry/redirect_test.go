package registry

import (
	"net/http"
	"testing"
)

// TestCredentialsStayWithTheirHost follows a redirect to another port of the
// same machine: net/http alone would send the token there.
func TestCredentialsStayWithTheirHost(t *testing.T) {
	for _, c := range []struct{ from, to, want string }{
		{"https://a.example/x", "https://a.example/y", "secret"},
		{"https://a.example/x", "https://a.example:9000/y", ""},
		{"https://a.example/x", "http://a.example/y", ""},
		{"https://a.example/x", "https://cdn.a.example/y", ""},
	} {
		from, err := http.NewRequest(http.MethodGet, c.from, nil)
		if err != nil {
			t.Fatal(err)
		}
		to, err := http.NewRequest(http.MethodGet, c.to, nil)
		if err != nil {
			t.Fatal(err)
		}
		check := redirectCheck(&Host{Header: http.Header{"X-Secret": {"secret"}}})
		via := []*http.Request{from}
		for range 2 { // there, and back from there
			to.Header.Set("Authorization", "secret")
			to.Header.Set("X-Secret", "secret")
			if err := check(to, via); err != nil || to.Header.Get("Authorization") != c.want || to.Header.Get("X-Secret") != c.want {
				t.Errorf("%s to %s: %v, %v", c.from, c.to, to.Header, err)
			}
			via, to = append(via, to), from.Clone(t.Context())
		}
		if err := check(to, make([]*http.Request, maxRedirects)); err == nil {
			t.Error("no end of redirects")
		}
	}
}
