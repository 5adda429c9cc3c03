package registry

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
)

// answers is a transport whose hosts all want a token.
type answers struct {
	challenge string
	asked     []string
}

func (a *answers) RoundTrip(req *http.Request) (*http.Response, error) {
	a.asked = append(a.asked, req.Host+" "+req.URL.String())
	return &http.Response{StatusCode: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {a.challenge}}, Request: req, Body: http.NoBody}, nil
}

func (a *answers) CloseIdleConnections() {}

// TestRealms has pairs of registries and token services.
func TestRealms(t *testing.T) {
	names := map[string]string{
		"hub.example": "93.184.215.14", "registry.corp": "10.0.0.5", "gitlab.corp": "10.0.0.6", "six.corp": "fd00::1",
		"both.corp": "10.0.0.7 93.184.215.14", "localhost": "127.0.0.1 ::1", "trap.example": "169.254.169.254",
	}
	lookup := func(_ context.Context, host string) (list []netip.Addr, err error) {
		text, ok := names[host]
		if !ok {
			if addr, err := netip.ParseAddr(host); err == nil {
				return []netip.Addr{addr}, nil
			}
			return nil, errors.New("no such host")
		}
		for _, s := range strings.Fields(text) {
			list = append(list, netip.MustParseAddr(s))
		}
		return list, nil
	}
	for _, tc := range []struct {
		name, registry, realm string
		renamed               bool
		ns                    string // what the registry is a mirror of
	}{
		{"GitLab", "https://registry.corp", "https://gitlab.corp/jwt/auth", true, ""},
		{"GitLab by address", "https://10.0.0.5:5000", "https://10.0.0.6/jwt/auth", true, ""},
		{"IPv6", "https://registry.corp", "https://six.corp/auth", true, ""},
		{"mirror on the node", "http://127.0.0.1:4001", "https://gitlab.corp/jwt/auth?x=1", true, ""},
		{"mirror on the node, of the network", "http://127.0.0.1:4001", "https://gitlab.corp/jwt/auth", true, "registry.corp:5000"},
		{"mirror on the node, of the Internet", "http://127.0.0.1:4001", "https://gitlab.corp/jwt/auth", false, "hub.example"},
		{"mirror on the node, to the node", "http://127.0.0.1:4001", "http://localhost:8080/auth", false, "registry.corp"},
		{"mirror of a registry on the node", "http://127.0.0.1:4001", "http://localhost:8080/auth", true, "127.0.0.1:5000"},
		{"both on the node", "http://127.0.0.1:4001", "http://localhost:5001/auth", true, ""},
		{"the same host", "https://registry.corp", "https://registry.corp:8443/auth", false, ""},
		{"on the Internet", "https://hub.example", "https://auth.example/token", false, ""},
		{"from the Internet inside", "https://hub.example", "https://gitlab.corp/jwt/auth", false, ""},
		{"an address of the Internet", "https://both.corp", "https://gitlab.corp/jwt/auth", false, ""},
		{"to the Internet, too", "https://registry.corp", "https://both.corp/auth", false, ""},
		{"to this machine", "https://registry.corp", "https://localhost:8080/", false, ""},
		{"metadata of a cloud", "https://registry.corp", "http://169.254.169.254/latest", false, ""},
		{"metadata of a cloud, by name", "https://registry.corp", "https://trap.example/latest", false, ""},
		{"metadata of a cloud, NAT", "https://registry.corp", "https://100.100.100.200/latest", false, ""},
		{"unspecified", "https://registry.corp", "https://0.0.0.0/", false, ""},
		{"without TLS", "https://registry.corp", "http://gitlab.corp/jwt/auth", false, ""},
		{"another scheme", "https://registry.corp", "ftp://gitlab.corp/jwt/auth", false, ""},
		{"unknown host", "https://registry.corp", "https://gone.corp/auth", false, ""},
		{"unknown registry", "https://gone.corp", "https://gitlab.corp/auth", false, ""},
		{"no URL", "https://registry.corp", "https://gitlab.corp:x/", false, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := &answers{challenge: `Bearer service="s",realm="` + tc.realm + `",scope="repository:x:pull"`}
			r := newRealms(a)
			r.lookup = lookup
			get := func(u string) *http.Response {
				t.Helper()
				ctx := context.WithValue(t.Context(), attemptKey{}, &attempt{ns: tc.ns})
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := r.RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				return resp
			}
			told := get(tc.registry + "/v2/").Header.Get("Www-Authenticate")
			if !tc.renamed {
				if told != a.challenge {
					t.Errorf("became %s", told)
				}
				return
			}
			realm := told[strings.Index(told, `realm="`)+len(`realm="`):]
			realm, rest, _ := strings.Cut(realm, `"`)
			if u, err := url.Parse(realm); err != nil || u.Scheme+"://"+u.Host != tc.registry || rest != `,scope="repository:x:pull"` {
				t.Fatalf("became %s", told)
			}
			more, sep := "service=s", "?"
			if strings.Contains(tc.realm, "?") {
				sep = "&"
			}
			resp := get(realm + sep + more)
			u, err := url.Parse(tc.realm)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := a.asked[1], u.Host+" "+tc.realm+sep+more; got != want || resp.Request.URL.Host != u.Host {
				t.Errorf("asked %s, want %s", got, want)
			}
			// Another registry does not get there.
			get("https://evil.example" + strings.TrimPrefix(realm, tc.registry))
			if got := a.asked[2]; !strings.HasPrefix(got, "evil.example https://evil.example"+realmPath) {
				t.Errorf("asked %s", got)
			}
		})
	}
}

// TestRealmsAreBounded names many token services.
func TestRealmsAreBounded(t *testing.T) {
	a := &answers{}
	r := newRealms(a)
	for i := range 3 * maxRealms {
		a.challenge = `Bearer realm="http://[::1]:1/` + strings.Repeat("x", i) + `"`
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1/v2/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.RoundTrip(req); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(r.known); n == 0 || n > maxRealms {
		t.Errorf("%d are known", n)
	}
}
