package registry_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/hosts"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// authority returns the certificate of a TLS server in PEM; it has signed itself.
func authority(t *testing.T, addr string) string {
	t.Helper()
	d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	der := conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Raw
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// TestMirrorTLS has a mirror with TLS and settings of it in hosts.toml.
func TestMirrorTLS(t *testing.T) {
	for _, tc := range []struct {
		name, scheme, settings string
		tls, served            bool
	}{
		{"redirect, authority", "https", `ca = "ca.pem"`, true, true},
		{"redirect, not verified", "https", "skip_verify = true", true, false}, // the target has to be
		{"authority", "https", `ca = "ca.pem"`, true, true},
		{"no settings", "https", "", true, false},
		{"not verified", "https", "skip_verify = true", true, true},
		{"another authority", "https", `ca = "other.pem"`, true, false},
		{"http in the URL, TLS spoken", "http", "skip_verify = true", true, true},
		{"http in the URL, TLS not spoken", "http", "skip_verify = true", false, true},
		{"http in the URL, no settings", "http", "", true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, registrytest.Options{TLS: tc.tls, Redirect: strings.HasPrefix(tc.name, "redirect")})
			m := withMirrors(t, fast(), p.origin, fmt.Sprintf("[host.\"%s://%s\"]\n%s", tc.scheme, p.mirror.Host(), tc.settings))
			dir := filepath.Join(m.dir, strings.Replace(p.origin.Host(), ":", "_", 1)+"_")
			files := map[string]string{"other.pem": string(selfSigned(t))}
			if tc.tls {
				files["ca.pem"] = authority(t, p.mirror.Host())
			}
			for name, text := range files {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			repo := repository(t, m.client, p.origin)
			for range 2 {
				p.read(t, repo, 0, 1000)
			}
			if served := p.mirror.BlobStats(p.desc.Digest).Bytes == 2000 && asked(p.origin) == 0; served != tc.served {
				t.Errorf("the mirror sent %d bytes: %s", p.mirror.BlobStats(p.desc.Digest).Bytes, &m.log)
			}
		})
	}
}

// selfSigned returns a certificate and its key in PEM.
func selfSigned(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
}

// TestMirrorClientCertificate has a mirror that wants to know its clients.
func TestMirrorClientCertificate(t *testing.T) {
	p := newPair(t, registrytest.Options{})
	client := selfSigned(t)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(client)
	proxy := httptest.NewUnstartedServer(forward(t, p.mirror.Host(), nil))
	proxy.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	proxy.StartTLS()
	defer proxy.Close()
	for _, with := range []bool{true, false} {
		settings := "skip_verify = true\n"
		if with {
			settings += "client = \"client.pem\"\n"
		}
		m := withMirrors(t, fast(), p.origin, fmt.Sprintf("[host.%q]\n%s", proxy.URL, settings))
		dir := filepath.Join(m.dir, strings.Replace(p.origin.Host(), ":", "_", 1)+"_")
		if err := os.WriteFile(filepath.Join(dir, "client.pem"), client, 0o600); err != nil {
			t.Fatal(err)
		}
		p.mirror.Reset()
		p.read(t, repository(t, m.client, p.origin), 0, 1000)
		if served := asked(p.mirror) == 1; served != with {
			t.Errorf("with a certificate %v: the mirror was asked %v\n%s", with, served, &m.log)
		}
	}
}

// forward is a handler that asks the server at addr; look sees the requests.
func forward(t *testing.T, addr string, look func(*http.Request)) http.Handler {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if look != nil {
			look(r)
		}
		out := r.Clone(r.Context())
		out.URL.Scheme, out.URL.Host, out.RequestURI = "http", addr, ""
		resp, err := transport.RoundTrip(out)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for name, values := range resp.Header {
			w.Header()[name] = values
		}
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body) // the client sees a short answer
	})
}

// TestProxy reaches registries through an HTTP proxy that the environment
// names, and those in NO_PROXY directly.
func TestProxy(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	data := random(10_000)
	desc := reg.PushBlob("library/x", "", data)
	var mu sync.Mutex
	var through []string
	proxy := httptest.NewServer(forward(t, reg.Host(), func(r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		through = append(through, r.URL.Host)
	}))
	defer proxy.Close()
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("NO_PROXY", "direct.test,2001:db8:1::/48,10.0.0.0/8")
	for host, proxied := range map[string]bool{
		"registry.test:5000": true, "direct.test:5000": false, "sub.direct.test": false,
		"[2001:db8:2::1]:5000": true, "[2001:db8:1::1]:5000": false, "10.1.2.3": false, reg.Host(): false,
	} {
		cfg := fast()
		cfg.RetryMax = -1
		cfg.PlainHTTP = func(string) bool { return true }
		tree := t.TempDir()
		if err := os.Mkdir(filepath.Join(tree, "_default"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, "_default/hosts.toml"), []byte("dial_timeout = \"100ms\""), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg.Hosts = hosts.New([]string{tree}, hosts.Options{PlainHTTP: cfg.PlainHTTP}).Hosts
		name, err := reference.ParseNamed(host + "/library/x")
		if err != nil {
			t.Fatal(err)
		}
		rc, err := newClient(t, cfg).Repository(name).Range(t.Context(), desc.Digest, 0, 1000)
		_, err = readAll(t, rc, err)
		mu.Lock()
		if proxied && (err != nil || len(through) != 1 || through[0] != host) || !proxied && len(through) != 0 {
			t.Errorf("%s: error %v, through the proxy: %v", host, err, through)
		}
		through = nil
		mu.Unlock()
	}
}

// TestIPv6 has a registry and a mirror at IPv6 addresses.
func TestIPv6(t *testing.T) {
	listen := func() net.Listener {
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "[::1]:0")
		if err != nil {
			t.Skip("needs IPv6 on the loopback interface: ", err)
		}
		return l
	}
	p := newPair(t, registrytest.Options{Listener: listen()})
	origin := registrytest.Start(t, registrytest.Options{Listener: listen()})
	origin.PushBlob("library/x", "", p.data)
	dir := t.TempDir()
	m := &mirrors{dir: dir, client: newClient(t, registry.Config{RetryWait: time.Millisecond, Hosts: hosts.New([]string{dir}, hosts.Options{}).Hosts})}
	host, port, err := net.SplitHostPort(origin.Host())
	if err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(dir, "["+host+"]_"+port+"_")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sub, "hosts.toml"), []byte(hostTable(p.mirror, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	repo := repository(t, m.client, origin)
	p.read(t, repo, 0, 1000)
	p.mirror.Close()
	p.read(t, repo, 0, 1000)
	if asked(p.mirror) != 1 || asked(origin) != 1 {
		t.Errorf("the mirror was asked %d times, the registry %d times", asked(p.mirror), asked(origin))
	}
}
