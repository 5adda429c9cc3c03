package faults

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	oras "oras.land/oras-go/v2"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// server is the name of nginx, which is on this machine.
const server = "registry.test"

// peer is a docker-registry of Debian behind nginx.
type peer struct {
	t       *testing.T
	dir     string // files of nginx and of its clients
	ca      *authority
	host    string // of nginx: "registry.test:PORT"
	port    string
	backend string // of docker-registry, which nginx asks
	open    string // another one of the same content that anybody may push to
	cmd     *exec.Cmd
	auth    string // of docker-registry's settings
}

// front is what differs between peers.
type front struct {
	http, server string // lines of nginx's settings
	// auth returns lines of docker-registry's settings and more of nginx's server.
	auth func(p *peer) (distribution, server string)
}

// newPeer starts it all.
func newPeer(t *testing.T, f front) *peer {
	t.Helper()
	need(t, "docker-registry", "nginx")
	p := &peer{t: t, dir: t.TempDir()}
	p.ca = newAuthority(t, p.dir)
	p.ca.issue(server)
	p.ca.issue("client")
	_, p.port, _ = net.SplitHostPort(freeAddress(t))
	p.host, p.backend, p.open = net.JoinHostPort(server, p.port), freeAddress(t), freeAddress(t)
	if f.auth != nil {
		p.auth, f.server = f.auth(p)
	}
	p.distribution("open", p.open, "")
	p.startBackend()
	p.nginx(f)
	return p
}

// freeAddress is one of this machine that stays free long enough.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	return l.Addr().String()
}

func (p *peer) path(name string) string { return filepath.Join(p.dir, name) }

func (p *peer) startBackend() { p.cmd = p.distribution("backend", p.backend, p.auth) }

// endBackend leaves nginx without the registry behind it.
func (p *peer) endBackend() {
	_ = p.cmd.Process.Kill() // it runs: nothing else ends it
	_ = p.cmd.Wait()         // killed
}

// distribution starts a docker-registry on the content that all of them share.
func (p *peer) distribution(name, address, auth string) *exec.Cmd {
	p.t.Helper()
	text := fmt.Sprintf("version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %q}\n%s", p.path("data"), address, auth)
	check(p.t, os.WriteFile(p.path(name+".yml"), []byte(text), 0o600))
	return p.start(name, address, "docker-registry", "serve", p.path(name+".yml"))
}

// nginx starts nginx before the backend.
func (p *peer) nginx(f front) {
	p.t.Helper()
	const settings = `
daemon off; master_process off;
pid DIR/nginx.pid;
error_log DIR/error.log info;
events {}
http {
	access_log DIR/access.log;
	client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi; uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
	HTTP
	server {
		listen 127.0.0.1:PORT ssl http2;
		ssl_certificate DIR/registry.test.pem; ssl_certificate_key DIR/registry.test.key;
		SERVER
		location / {
			proxy_pass http://BACKEND;
			proxy_http_version 1.1;
			proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto https;
		}
	}
}
`
	text := strings.NewReplacer("HTTP", f.http, "SERVER", f.server, "PORT", p.port, "BACKEND", p.backend).Replace(settings)
	check(p.t, os.WriteFile(p.path("nginx.conf"), []byte(strings.ReplaceAll(text, "DIR", p.dir)), 0o600))
	p.start("nginx", net.JoinHostPort("127.0.0.1", p.port), "nginx", "-p", p.dir, "-c", p.path("nginx.conf"), "-e", p.path("error.log"))
}

// start runs a program until the test ends, and waits until it listens.
func (p *peer) start(name, address string, program string, args ...string) *exec.Cmd {
	p.t.Helper()
	log, err := os.OpenFile(p.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	check(p.t, err)
	defer log.Close()
	cmd := exec.CommandContext(context.Background(), program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(p.t, cmd.Start())
	p.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill() // it runs: nothing else ends it
			_ = cmd.Wait()         // killed
		}
		if p.t.Failed() {
			p.t.Logf("%s:\n%s", name, p.file(name+".log"))
		}
	})
	eventually(p.t, name+" listens", func() bool {
		c, err := new(net.Dialer).DialContext(p.t.Context(), "tcp", address)
		if err != nil {
			return false
		}
		_ = c.Close() // nothing was sent
		return true
	})
	return cmd
}

func (p *peer) file(name string) string {
	b, _ := os.ReadFile(p.path(name)) // none is an empty one
	return string(b)
}

// answered is how many requests for blobs nginx has answered with a status.
func (p *peer) answered(status int) int {
	n := 0
	for line := range strings.Lines(p.file("access.log")) {
		if strings.Contains(line, "/blobs/") && strings.Contains(line, fmt.Sprintf(`" %d `, status)) {
			n++
		}
	}
	return n
}

// push copies a new image to the registry.
func (p *peer) push(repo string) image {
	p.t.Helper()
	reg := registrytest.Start(p.t, registrytest.Options{})
	i := push(reg, repo)
	from, err := remote.NewRepository(reg.Host() + "/" + repo)
	check(p.t, err)
	to, err := remote.NewRepository(p.open + "/" + repo)
	check(p.t, err)
	from.PlainHTTP, to.PlainHTTP = true, true
	_, err = oras.Copy(p.t.Context(), from, "v1", to, "v1", oras.DefaultCopyOptions)
	check(p.t, err)
	return i
}

// hostsFile makes a file of addresses as /etc/hosts is.
func hostsFile(t *testing.T, address string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "hosts")
	check(t, os.WriteFile(file, fmt.Appendf(nil, "127.0.0.1 localhost\n%s %s\n", address, server), 0o644))
	return file
}

// privately is the prefix of a command that has a file as its /etc/hosts.
func privately(file string) []string {
	return []string{"unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/hosts && exec "$@"`, file}
}

// outside sees the mounts of a guest that has mounts of its own.
func (g *guest) outside() *guest {
	g.view = fmt.Sprintf("/proc/%d/root", g.cmd.Process.Pid)
	return g
}

// config makes a directory with a config.json that has the user's password.
func (p *peer) config() string {
	p.t.Helper()
	text := fmt.Appendf(nil, `{"auths":{%q:{"username":%q,"password":%q}}}`, p.host, user, password)
	check(p.t, os.MkdirAll(p.path("docker"), 0o700))
	check(p.t, os.WriteFile(p.path("docker/config.json"), text, 0o600))
	return p.path("docker")
}

// relay starts a node and a guest of it. hosts are lines of hosts.toml besides the
// authority.
func (p *peer) relay(hosts string) *guest {
	p.t.Helper()
	dir := filepath.Join(p.dir, "certs.d", p.host)
	check(p.t, os.MkdirAll(dir, 0o700))
	text := fmt.Sprintf("server = %q\n[host.%q]\nca = %q\n%s\n", "https://"+p.host, "https://"+p.host, p.ca.path("ca.pem"), hosts)
	check(p.t, os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600))
	h := startHost(p.t, relayed("[registry]", quoted("credentials", filepath.Join(p.config(), "config.json")), quoted("config_path", filepath.Dir(dir))),
		privately(hostsFile(p.t, "127.0.0.1"))...)
	return h.attached(p.t)
}

// direct starts a guest that asks the registry itself.
func (p *peer) direct() *guest {
	p.t.Helper()
	env := []string{"SSL_CERT_FILE=" + p.ca.path("ca.pem"), "DOCKER_CONFIG=" + p.config()}
	return direct(p.t, env, privately(hostsFile(p.t, "127.0.0.1"))).outside()
}
