package faults

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// both runs a test with a guest of each kind and an image of its own.
func (p *peer) both(f func(t *testing.T, g *guest, i image, root string)) {
	guests := map[string]*guest{"relay": p.relay(""), "direct": p.direct()}
	for kind, g := range guests {
		p.t.Run(kind, func(t *testing.T) {
			i := p.push(kind)
			f(t, g, i, g.mustPull(t, kind, p.host+"/"+kind+":v1"))
		})
	}
}

// readAll reads the whole image.
func readAll(t *testing.T, _ *guest, i image, root string) {
	t.Helper()
	if err := i.read(t, root, 0, files); err != nil {
		t.Error(err)
	}
}

// refused says that a request without credentials gets no further than nginx, or
// docker-registry, lets it: else the tests below would show nothing.
func (p *peer) refused(status int) {
	p.t.Helper()
	if p.answered(status) == 0 && !strings.Contains(p.file("access.log"), fmt.Sprintf(`" %d `, status)) {
		p.t.Errorf("nobody was answered with %d:\n%s", status, p.file("access.log"))
	}
}

// TestBasicAuth has nginx ask for a password, over TLS with an authority that only
// the programs under test know.
func TestBasicAuth(t *testing.T) {
	t.Parallel()
	p := newPeer(t, front{server: `auth_basic "tests"; auth_basic_user_file DIR/htpasswd;`})
	check(t, os.WriteFile(p.path("htpasswd"), []byte(user+":{PLAIN}"+password+"\n"), 0o600))
	p.both(readAll)
	p.refused(401)
}

// TestTokenAuth has docker-registry ask for tokens, which end while the image is
// mounted.
func TestTokenAuth(t *testing.T) {
	t.Parallel()
	const life = time.Second
	var s *tokens
	p := newPeer(t, front{auth: func(p *peer) (distribution, server string) {
		var address string
		s, address = startTokens(t, p.ca, life)
		return fmt.Sprintf("auth: {token: {realm: %q, service: %q, issuer: %q, rootcertbundle: %q}}\n", "https://"+p.host+"/token", service, issuer, p.ca.path("ca.pem")),
			fmt.Sprintf("location /token { proxy_pass http://%s; }", address)
	}})
	p.both(func(t *testing.T, g *guest, i image, root string) {
		time.Sleep(2 * life) // what was asked for to mount it has ended
		before := s.given.Load()
		readAll(t, g, i, root)
		if s.given.Load() == before {
			t.Error("no token was fetched while the guest read")
		}
	})
	p.refused(401)
}

// TestClientCertificate has nginx ask the node for a certificate.
func TestClientCertificate(t *testing.T) {
	t.Parallel()
	p := newPeer(t, front{server: "ssl_client_certificate DIR/ca.pem; ssl_verify_client on;"})
	i := p.push("lib/certificate")
	ref := p.host + "/lib/certificate:v1"
	without := p.relay("")
	if _, err := without.pull(t, "without", ref); err == nil || !strings.Contains(err.Error(), p.host) {
		t.Errorf("without a certificate: %v", err)
	}
	p.refused(400) // nginx's answer
	g := p.relay(fmt.Sprintf("client = [[%q, %q]]", p.ca.path("client.pem"), p.ca.path("client.key")))
	readAll(t, g, i, g.mustPull(t, "with", ref))
}

// TestUnknownAuthority does not talk to a registry that nobody vouches for.
func TestUnknownAuthority(t *testing.T) {
	t.Parallel()
	p := newPeer(t, front{})
	p.push("lib/unknown")
	g := direct(t, nil, privately(hostsFile(t, "127.0.0.1"))).outside()
	_, err := g.pull(t, "unknown", p.host+"/lib/unknown:v1")
	if err == nil || !strings.Contains(err.Error(), "add the authority that signed the registry's certificate") || !strings.Contains(err.Error(), p.host) {
		t.Errorf("pull: %v", err)
	}
}

// TestRateLimit has nginx refuse what comes too fast.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	for _, status := range []int{429, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			p := newPeer(t, front{
				http:   "limit_req_zone $binary_remote_addr zone=slow:1m rate=4r/s;",
				server: fmt.Sprintf("limit_req zone=slow burst=1 nodelay; limit_req_status %d;", status),
			})
			p.both(readAll)
			if n := p.answered(status); n == 0 {
				t.Errorf("nobody was told to slow down:\n%s", p.file("access.log"))
			}
		})
	}
}

// TestBackendDies kills docker-registry behind nginx, which answers 502 until it is
// back.
func TestBackendDies(t *testing.T) {
	t.Parallel()
	p := newPeer(t, front{})
	p.both(func(t *testing.T, _ *guest, i image, root string) {
		if err := i.read(t, root, 0, 1); err != nil {
			t.Error(err)
		}
		p.endBackend()
		before := p.answered(502)
		read := make(chan error, 1)
		go func() { read <- i.read(t, root, 1, files) }()
		eventually(t, "nginx misses docker-registry", func() bool { return p.answered(502) >= before+2*storm })
		p.startBackend()
		if err := <-read; err != nil {
			t.Error(err)
		}
	})
}
