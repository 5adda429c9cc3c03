package registry_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// tinyproxy is Debian's tinyproxy at work.
type tinyproxy struct{ host, log string }

// startTinyproxy runs it until the test ends; settings are more lines of its
// configuration.
func startTinyproxy(t *testing.T, settings string) *tinyproxy {
	t.Helper()
	dir := t.TempDir()
	host := freePort(t)
	_, port, err := net.SplitHostPort(host)
	if err != nil {
		t.Fatal(err)
	}
	p := &tinyproxy{host: host, log: filepath.Join(dir, "log")}
	config := filepath.Join(dir, "config")
	text := fmt.Sprintf("Port %s\nListen 127.0.0.1\nLogFile %q\nLogLevel Connect\nTimeout 60\nMaxClients 64\n%s\n", port, p.log, settings)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, host, "tinyproxy-bin", "tinyproxy", "-d", "-c", config)
	return p
}

// asked returns the requests that the proxy got: "CONNECT host:port".
func (p *tinyproxy) asked(t *testing.T) (list []string) {
	t.Helper()
	text, err := os.ReadFile(p.log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		// CONNECT   Nov 27 20:00:00.000 [1]: Request (file descriptor 5): GET http://… HTTP/1.1
		if _, request, ok := strings.Cut(line, "): "); ok && strings.Contains(line, "Request (") {
			if words := strings.Fields(request); len(words) == 3 {
				list = append(list, words[0]+" "+words[1])
			}
		}
	}
	return list
}

// start runs a program of a Debian package until the test ends, and waits until
// it listens at host.
func start(t *testing.T, host, pkg, program string, args ...string) {
	t.Helper()
	binary, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("needs Debian's package %s: %v", pkg, err)
	}
	run(t, host, exec.Command(binary, args...))
}

// run runs cmd until the test ends, and waits until it listens at host.
func run(t *testing.T, host string, cmd *exec.Cmd) {
	t.Helper()
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // killed, or its output tells why
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
		if t.Failed() {
			t.Logf("%s says:\n%s", filepath.Base(cmd.Path), output.String())
		}
	})
	for range 3000 {
		if conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", host); err == nil {
			_ = conn.Close() // nothing was sent
			return
		}
		select {
		case <-ended:
			t.Fatalf("%s has ended", filepath.Base(cmd.Path))
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Fatalf("%s does not listen on %s", filepath.Base(cmd.Path), host)
}

// anyAddress returns a registry that is reached at the unspecified address: it
// is this machine, but not for httpproxy, which never takes a proxy to loopback
// addresses.
func anyAddress(t *testing.T, address string, opts registrytest.Options) (reg *registrytest.Server, host string) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	opts.Listener = l
	return registrytest.Start(t, opts), net.JoinHostPort(address, port)
}

// TestTinyproxy reads from registries through a real proxy.
func TestTinyproxy(t *testing.T) {
	const secret = "hunter2"
	const login = "http://user:" + secret + "@"
	for _, tc := range []struct {
		name     string
		settings string // of tinyproxy; %s is the registry's port
		proxy    string // of the environment, before the proxy's host
		no       string // NO_PROXY
		address  string // of the registry
		tls      bool
		asked    string // what the proxy was asked, "": nothing; %s is the registry
		want     string // in the error
		class    func(error) bool
	}{
		{name: "TLS", proxy: "http://", address: "0.0.0.0", tls: true, asked: "CONNECT %s"},
		{name: "plain", proxy: "http://", address: "0.0.0.0", asked: "GET http://%s/v2/library/x/blobs/"},
		{name: "without scheme", proxy: "", address: "0.0.0.0", tls: true, asked: "CONNECT %s"},
		{name: "IPv6, TLS", proxy: "http://", address: "::", tls: true, asked: "CONNECT %s"},
		{name: "IPv6, plain", proxy: "http://", address: "::", asked: "GET http://%s/v2/library/x/blobs/"},
		{name: "login, TLS", settings: "BasicAuth user " + secret, proxy: login, address: "0.0.0.0", tls: true, asked: "CONNECT %s"},
		{name: "login, plain", settings: "BasicAuth user " + secret, proxy: login, address: "0.0.0.0", asked: "GET http://%s/v2/library/x/blobs/"},
		{name: "NO_PROXY", proxy: "http://", no: "10.0.0.0/8,0.0.0.0", address: "0.0.0.0", tls: true},
		{name: "NO_PROXY, IPv6", proxy: "http://", no: "::/16", address: "::", tls: true},
		{name: "NO_PROXY with a port", proxy: "http://", no: "0.0.0.0:1", address: "0.0.0.0", tls: true, asked: "CONNECT %s"},
		{name: "no login, TLS", settings: "BasicAuth user " + secret, proxy: "http://", address: "0.0.0.0", tls: true, asked: "CONNECT %s",
			want: "HTTP status 407", class: errdefs.IsFailedPrecondition},
		{name: "no login, plain", settings: "BasicAuth user " + secret, proxy: "http://", address: "0.0.0.0", asked: "GET http://%s/v2/library/x/blobs/",
			want: "HTTP status 407", class: errdefs.IsFailedPrecondition},
		{name: "wrong login", settings: "BasicAuth user other", proxy: login, address: "0.0.0.0", tls: true, asked: "CONNECT %s",
			want: "user:password", class: errdefs.IsFailedPrecondition},
		{name: "port that is not allowed", settings: "ConnectPort 1", proxy: "http://", address: "0.0.0.0", tls: true, asked: "CONNECT %s",
			want: "NO_PROXY", class: errdefs.IsFailedPrecondition},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.address == "::" {
				needIPv6(t)
			}
			reg, host := anyAddress(t, tc.address, registrytest.Options{TLS: tc.tls})
			data := random(100_000)
			desc := reg.PushBlob("library/x", "", data)
			proxy := startTinyproxy(t, tc.settings)
			t.Setenv("HTTP_PROXY", tc.proxy+proxy.host)
			t.Setenv("HTTPS_PROXY", tc.proxy+proxy.host)
			t.Setenv("NO_PROXY", tc.no)
			client := newClient(t, throughProxy(reg, tc.tls))
			rc, err := client.Repository(parse(t, host+"/library/x")).Range(t.Context(), desc.Digest, 1000, 50_000)
			got, err := readAll(t, rc, err)
			if tc.class != nil {
				checkProxyError(t, err, tc.want, proxy.host, tc.class)
			} else if err != nil || !bytes.Equal(got, data[1000:51_000]) {
				t.Errorf("range: %v, %d bytes", err, len(got))
			}
			if r := reg.Requests("/blobs/"); tc.class == nil && (len(r) != 1 || tc.tls != (r[0].Proto == 2)) {
				t.Errorf("the registry was asked %+v", r)
			}
			asked := proxy.asked(t)
			if tc.asked == "" {
				if len(asked) != 0 {
					t.Errorf("the proxy was asked %q", asked)
				}
			} else if want := fmt.Sprintf(tc.asked, host); len(asked) != 1 || !strings.HasPrefix(asked[0], want) {
				t.Errorf("the proxy was asked %q, want once %q", asked, want)
			}
		})
	}
}

// throughProxy is fast with what a registry at an unspecified address needs.
func throughProxy(reg *registrytest.Server, secure bool) registry.Config {
	cfg := fast()
	cfg.PlainHTTP = func(string) bool { return !secure }
	if secure {
		cfg.TLS = reg.TLSConfig()
		cfg.TLS.ServerName = "example.com" // which the certificate of httptest has
	}
	return cfg
}

func needIPv6(t *testing.T) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "[::1]:0")
	if err != nil {
		t.Skip("needs IPv6 on the loopback interface: ", err)
	}
	_ = l.Close() // nothing was accepted
}

func checkProxyError(t *testing.T, err error, want, proxy string, class func(error) bool) {
	t.Helper()
	if err == nil || !class(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "proxy") {
		t.Errorf("got error %v, want %q in it", err, want)
	}
	var e *registry.Error
	if errors.As(err, &e) && e.Status == 0 {
		t.Errorf("%v has no status", err)
	}
	if err != nil && strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the password of proxy %s is in the error %v", proxy, err)
	}
}

// TestProxyDown: the error names the proxy, which is what has to be mended.
func TestProxyDown(t *testing.T) {
	proxy := freePort(t)
	t.Setenv("HTTPS_PROXY", "http://user:hunter2@"+proxy)
	cfg := fast()
	cfg.RetryMax = -1
	_, err := newClient(t, cfg).Repository(parse(t, "registry.test/library/x")).Resolve(t.Context(), "v1")
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), proxy) || !strings.Contains(err.Error(), "is the proxy") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got error %v", err)
	}
}

// TestProxyToNowhere: the proxy cannot reach the registry, which is tried again
// as without a proxy.
func TestProxyToNowhere(t *testing.T) {
	proxy := startTinyproxy(t, "")
	t.Setenv("HTTPS_PROXY", "http://"+proxy.host)
	cfg := fast()
	cfg.RetryMax = 1
	_, port, err := net.SplitHostPort(freePort(t))
	if err != nil {
		t.Fatal(err)
	}
	host := net.JoinHostPort("0.0.0.0", port)
	_, err = newClient(t, cfg).Repository(parse(t, host+"/library/x")).Resolve(t.Context(), "v1")
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "proxy") {
		t.Errorf("got error %v", err)
	}
	if asked := proxy.asked(t); len(asked) != 2 {
		t.Errorf("the proxy was asked %q, want twice", asked)
	}
}

// TestMirrorThroughProxy has mirrors of hosts.toml behind a proxy: one that the
// proxy does not reach, and one with an authority of its own.
func TestMirrorThroughProxy(t *testing.T) {
	origin := registrytest.Start(t, registrytest.Options{})
	mirror, host := anyAddress(t, "0.0.0.0", registrytest.Options{TLS: true})
	data := random(3 << 20)
	desc := mirror.PushBlob("library/x", "", data)
	proxy := startTinyproxy(t, "BasicAuth user secret")
	t.Setenv("HTTPS_PROXY", "http://user:secret@"+proxy.host)
	dead := strings.Replace(freePort(t), "127.0.0.1", "0.0.0.0", 1)
	cfg := fast()
	cfg.RetryMax = -1
	m := withMirrors(t, cfg, origin, fmt.Sprintf("[host.\"https://%s\"]\nskip_verify = true\n[host.\"https://%s\"]\nskip_verify = true\ndial_timeout = \"2s\"\n", dead, host))
	repo := repository(t, m.client, origin)
	for off := range int64(3) {
		rc, err := repo.Range(t.Context(), desc.Digest, off<<20, 1<<20)
		if got, err := readAll(t, rc, err); err != nil || !bytes.Equal(got, data[off<<20:(off+1)<<20]) {
			t.Fatalf("range: %v, %d bytes\n%s", err, len(got), &m.log)
		}
	}
	if n := asked(origin); n != 0 {
		t.Errorf("the registry was asked %d times\n%s", n, &m.log)
	}
	want := []string{"CONNECT " + dead, "CONNECT " + host}
	if got := proxy.asked(t); strings.Join(got, ",") != strings.Join(want, ",") {
		t.Errorf("the proxy was asked %q, want %q", got, want)
	}
}

// TestDialWithoutProxy: whoever brings connections of its own, as the guest does
// for vsock, does not get a proxy between.
func TestDialWithoutProxy(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{TLS: true})
	desc := reg.PushBlob("library/x", "", random(1000))
	t.Setenv("HTTPS_PROXY", "http://"+freePort(t))
	cfg := fast()
	cfg.TLS = &tls.Config{RootCAs: reg.TLSConfig().RootCAs, ServerName: "example.com", MinVersion: tls.VersionTLS12}
	cfg.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, reg.Host())
	}
	rc, err := newClient(t, cfg).Repository(parse(t, "registry.test/library/x")).Range(t.Context(), desc.Digest, 0, 1000)
	if _, err := readAll(t, rc, err); err != nil {
		t.Error(err)
	}
}
