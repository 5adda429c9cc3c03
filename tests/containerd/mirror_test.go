package containerd

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// mirrored is a node whose containerd is led to the mirror of its tatami-host by
// hosts.toml, and unpacks images itself.
type mirrored struct {
	*node
	reg     *registry
	private *registrytest.Server // wants a login
	mirror  string               // address
	certs   string               // tree of hosts.toml files
	tatami  *daemon
}

func newMirrored(t *testing.T, rel release) *mirrored {
	t.Helper()
	m := &mirrored{node: newNode(t, rel), reg: startRegistry(t), private: registrytest.Start(t, registrytest.Options{
		Auth: &registrytest.Auth{User: "user", Password: "secret"},
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m.mirror = l.Addr().String()
	l.Close() // the port stays free long enough
	m.certs = filepath.Join(m.dir, "certs.d")
	for _, domain := range []string{m.reg.host, m.private.Host(), "registry.test"} {
		// The file leads containerd to the mirror, and is read by tatami-host as well.
		server := domain
		if domain == "registry.test" {
			server = m.reg.host
		}
		text := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", server, m.mirror)
		dir := filepath.Join(m.certs, domain)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m.tatami = m.host(t, share+fmt.Sprintf("[mirror]\naddress = %q\n[registry]\nconfig_path = %q\n", m.mirror, m.certs))
	plugin := map[int]string{1: "io.containerd.grpc.v1.cri", 2: "io.containerd.cri.v1.images"}[rel.major]
	m.containerd(t, setup{Pause: m.reg.pushPause(t), Snapshotter: "overlayfs", Proxies: []proxy{m.proxyOf("tatami")}, Lines: fmt.Sprintf("[plugins.%q.registry]\nconfig_path = %q\n", plugin, m.certs)})
	return m
}

// TestMirror pulls through the mirror with containerd and skopeo.
func TestMirror(t *testing.T) {
	for _, rel := range releases {
		t.Run(rel.name, func(t *testing.T) {
			t.Parallel()
			need(t, "skopeo")
			m := newMirrored(t, rel)
			t.Run("once", m.testOnce)
			t.Run("unpacked after all", m.testFallback)
			t.Run("login", m.testLogin)
			t.Run("mirror down", m.testMirrorDown)
		})
	}
}

// testOnce pulls an image again and again: its layers are downloaded once. Under the
// name of another registry they are somebody else's, and downloaded once for that.
func (m *mirrored) testOnce(t *testing.T) {
	app := m.reg.pushApp(t, "app", 1)
	m.criLife(t, app, "")
	m.criLife(t, app, "")
	m.ctr(t, "image", "pull", "--hosts-dir", m.certs, app.ref)
	m.ctr(t, "image", "rm", "--sync", app.ref)
	m.sentTimes(t, app, 1)
	tag := app.ref[strings.LastIndexByte(app.ref, ':')+1:]
	for range 2 {
		out, err := exec.CommandContext(t.Context(), "skopeo", "copy", "--src-tls-verify=false", "--insecure-policy",
			"docker://"+m.mirror+"/registry.test/"+app.repo+":"+tag, "dir:"+t.TempDir()).CombinedOutput()
		if err != nil {
			t.Fatalf("skopeo: %v\n%s", err, out)
		}
	}
	m.sentTimes(t, app, 2)
}

// sentTimes says how often the registry has sent each layer of an image.
func (m *mirrored) sentTimes(t *testing.T, app image, n int64) {
	t.Helper()
	for _, l := range app.layers {
		if got := m.reg.sent(app.repo, l); got != n*l.size {
			t.Errorf("the registry has sent %d bytes of a layer of %d, want it %d times", got, l.size, n)
		}
	}
}

// testFallback pulls what tatami-host has read whole before it could say that it cannot
// be served lazily (containerd 1.6's ctr does not tell it the image, so there it is an
// ordinary pull).
func (m *mirrored) testFallback(t *testing.T) {
	odd := m.reg.pushImage(t, "odd", ocispec.ImageConfig{}, gzipped(t,
		registrytest.File("large", 0o644, noise(8, 1<<20)), registrytest.File("../outside", 0o644, "x")))
	m.ctr(t, "image", "pull", "--hosts-dir", m.certs, "--snapshotter", "tatami", odd.ref)
	if got := m.reg.sent(odd.repo, odd.layers[0]); got != odd.layers[0].size {
		t.Errorf("%d bytes of a layer of %d were taken from the registry", got, odd.layers[0].size)
	}
	if err := saysWhy(m.hostLog(t), "outside"); err != nil && m.rel.major > 1 {
		t.Error(err)
	}
}

// testLogin pulls what wants a login: with it, and then, when all of it is on the
// node, without it and with a wrong one.
func (m *mirrored) testLogin(t *testing.T) {
	layer := gzipped(t, registrytest.File("x", 0o644, noise(9, 1<<20)))
	img := m.private.PushImage("team/app", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
	ref := m.private.Host() + "/team/app:v1"
	m.crictl(t, "pull", "--creds", "user:secret", ref)
	m.crictl(t, "rmi", ref)
	m.crictl(t, "pull", "--creds", "user:secret", ref)
	m.crictl(t, "rmi", ref)
	if got := m.private.BlobStats(img.Layers[0].Digest).Bytes; got != img.Layers[0].Size {
		t.Errorf("two pulls took %d bytes of a layer of %d", got, img.Layers[0].Size)
	}
	for _, creds := range [][]string{nil, {"--creds", "user:wrong"}} {
		if _, err := m.try(t, m.crictlArgs(append(append([]string{"pull"}, creds...), ref)...)...); err == nil {
			t.Errorf("with %v an image is pulled that wants a login", creds)
		}
	}
	if log := m.hostLog(t); strings.Contains(log, "secret") || strings.Contains(log, "token-") {
		t.Error("a secret is in the log of tatami-host")
	}
}

// testMirrorDown pulls while there is no tatami-host.
func (m *mirrored) testMirrorDown(t *testing.T) {
	m.tatami.end(t, unix.SIGTERM)
	app := m.reg.pushApp(t, "later", 2)
	m.criLife(t, app, "")
}
