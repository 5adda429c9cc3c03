package hosts

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// write makes files below dir; names with a "/" at the end are directories.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// certificate returns a self-signed certificate and its key, both in PEM.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return block("CERTIFICATE", der), block("PRIVATE KEY", pkcs)
}

// tell writes hosts on one line each.
func tell(hosts []*registry.Host) string {
	var b strings.Builder
	for _, h := range hosts {
		fmt.Fprintf(&b, "%s://%s%s %04b", h.Scheme, h.Name, h.Path, h.Capabilities)
		if h.TLS != nil {
			fmt.Fprintf(&b, " tls(ca %v, certificates %d, skip %v)", h.TLS.RootCAs != nil, len(h.TLS.Certificates), h.TLS.InsecureSkipVerify)
		}
		if h.Upgrade {
			b.WriteString(" upgrade")
		}
		if h.DialTimeout != 0 {
			fmt.Fprintf(&b, " dial %s", h.DialTimeout)
		}
		if len(h.Header) > 0 {
			fmt.Fprintf(&b, " %v", h.Header)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// TestHosts holds what each file means against containerd's docs/hosts.md and
// core/remotes/docker/config/hosts.go.
func TestHosts(t *testing.T) {
	cert, key := certificate(t)
	for _, tc := range []struct {
		name, registry string
		files          map[string]string
		want           string
	}{
		{"nothing", "docker.io", nil, ""},
		{"docker's example", "docker.io", map[string]string{"docker.io/hosts.toml": `
server = "https://docker.io"
[host."https://registry-1.docker.io"]
  capabilities = ["pull", "resolve"]
`}, "https://registry-1.docker.io/v2 0011\nhttps://docker.io/v2 1111\n"},
		{"no server: the registry itself", "docker.io", map[string]string{"docker.io/hosts.toml": `
[host."https://mirror.example"]
`}, "https://mirror.example/v2 1111\nhttps://registry-1.docker.io/v2 1111\n"},
		{"order is the file's", "r.example", map[string]string{"r.example/hosts.toml": `
[host."https://z.example"]
[host."https://a.example"]
[host."https://z.example".header]
  a = "1"
[host."https://m.example"]
`}, "https://z.example/v2 1111 map[A:[1]]\nhttps://a.example/v2 1111\nhttps://m.example/v2 1111\nhttps://r.example/v2 1111\n"},
		{"default directory", "r.example:5000", map[string]string{
			"_default/hosts.toml": `server = "mirror.example"`, "other.example/hosts.toml": "",
		}, "https://mirror.example/v2 1111\n"},
		{"port, first form", "r.example:5000", map[string]string{
			"r.example_5000_/hosts.toml": `server = "a"`, "r.example:5000/hosts.toml": `server = "b"`, "_default/hosts.toml": `server = "c"`,
		}, "https://a/v2 1111\n"},
		{"port, second form", "r.example:5000", map[string]string{
			"r.example:5000/hosts.toml": `server = "b"`, "r.example/hosts.toml": `server = "d"`, "_default/hosts.toml": `server = "c"`,
		}, "https://b/v2 1111\n"},
		{"IPv6", "[2001:db8::1]:5000", map[string]string{
			"[2001:db8::1]_5000_/hosts.toml": `server = "http://[2001:db8::2]:80/x"`,
		}, "http://[2001:db8::2]:80/x/v2 1111\n"},
		{"paths", "r.example", map[string]string{"r.example/hosts.toml": `
[host."https://a.example/v2/"]
[host."https://b.example/sub//dir"]
[host."https://c.example/v2/proxy"]
  override_path = true
[host."https://d.example"]
  override_path = true
[host."https://e.example/v2/proxy"]
`}, "https://a.example/v2 1111\nhttps://b.example/sub/dir/v2 1111\nhttps://c.example/v2/proxy 1111\nhttps://d.example 1111\nhttps://e.example/v2/proxy/v2 1111\nhttps://r.example/v2 1111\n"},
		{"all settings", "r.example", map[string]string{"r.example/hosts.toml": `
server = "https://s.example"
capabilities = ["Push"]
[host."https://a.example"]
  ca = "ca.crt"
  client = [["c.cert", "c.key"], ["both.pem", ""]]
  skip_verify = false
  dial_timeout = "1500ms"
  [host."https://a.example".header]
    x-custom-2 = ["value1", "value2"]
[host."https://b.example"]
  ca = ["ca.crt", "ca.crt"]
  client = "both.pem"
  capabilities = ["referrers", "pull"]
[host."http://c.example:5000"]
  skip_verify = true
[host."http://d.example:80"]
  skip_verify = true
[host."http://e.example"]
  client = ["both.pem"]
`, "r.example/ca.crt": cert, "r.example/c.cert": cert, "r.example/c.key": key, "r.example/both.pem": key + cert},
			`https://a.example/v2 1111 tls(ca true, certificates 2, skip false) dial 1.5s map[X-Custom-2:[value1 value2]]
https://b.example/v2 1001 tls(ca true, certificates 1, skip false)
http://c.example:5000/v2 1111 tls(ca false, certificates 0, skip true) upgrade
http://d.example:80/v2 1111 tls(ca false, certificates 0, skip true)
http://e.example/v2 1111 tls(ca false, certificates 1, skip false) upgrade
https://s.example/v2 0100
`},
		{"the registry itself as a host", "r.example", map[string]string{"r.example/hosts.toml": `
server = "https://r.example"
[host."https://m.example"]
[host."https://r.example"]
  skip_verify = true
`}, "https://m.example/v2 1111\nhttps://r.example/v2 1111 tls(ca false, certificates 0, skip true)\n"},
		{"the registry itself before a mirror", "r.example", map[string]string{"r.example/hosts.toml": `
[host."https://r.example"]
  skip_verify = true
  capabilities = ["resolve"]
[host."https://m.example"]
`}, "https://r.example/v2 0010 tls(ca false, certificates 0, skip true)\nhttps://m.example/v2 1111\nhttps://r.example/v2 1111 tls(ca false, certificates 0, skip true)\n"},
		{"a server with settings of its own", "r.example", map[string]string{"r.example/hosts.toml": `
server = "https://r.example"
skip_verify = false
[host."https://r.example"]
  skip_verify = true
`}, "https://r.example/v2 1111 tls(ca false, certificates 0, skip true)\nhttps://r.example/v2 1111 tls(ca false, certificates 0, skip false)\n"},
		{"docker's certificates", "r.example:5000", map[string]string{
			"r.example:5000/a.crt": cert, "r.example:5000/b.cert": cert, "r.example:5000/b.key": key, "r.example:5000/c.cert": cert + key,
		}, "https://r.example:5000/v2 1111 tls(ca true, certificates 2, skip false)\n"},
		{"certificates beside an empty file", "r.example", map[string]string{"r.example/hosts.toml": "", "r.example/a.crt": cert},
			"https://r.example/v2 1111 tls(ca true, certificates 0, skip false)\n"},
		{"plain HTTP as the client says", "10.0.0.1:5000", map[string]string{"_default/hosts.toml": "[host.\"https://m.example\"]"},
			"https://m.example/v2 1111\nhttp://10.0.0.1:5000/v2 1111\n"},
		{"plain HTTP with an authority", "10.0.0.1:5000", map[string]string{"10.0.0.1_5000_/x.crt": cert},
			"http://10.0.0.1:5000/v2 1111 tls(ca true, certificates 0, skip false) upgrade\n"},
		{"unknown keys", "r.example", map[string]string{"r.example/hosts.toml": `
sever = "https://s.example"
[host."https://a.example"]
  rewrite = "x"
  capabilities = ["pull"]
`}, "https://a.example/v2 0001\nhttps://r.example/v2 1111\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, tc.files)
			tree := New([]string{filepath.Join(dir, "absent"), dir}, Options{PlainHTTP: registry.PlainHTTPHosts([]string{"10.0.0.1:5000"})})
			if got := tell(tree.Hosts(tc.registry)); got != tc.want {
				t.Errorf("got\n%swant\n%s", got, tc.want)
			}
		})
	}
}

func TestMistakes(t *testing.T) {
	cert, _ := certificate(t)
	for _, tc := range []struct{ name, text, want string }{
		{"syntax", "server = \n", "line 1"},
		{"type", "server = 5\n", "line 1"},
		{"capability", "[host.\"https://a\"]\ncapabilities = [\"pul\"]", `host a: capabilities "pul"`},
		{"scheme", `server = "ftp://a"`, "write https://"},
		{"no host", `server = "https:///x"`, "write https://"},
		{"password", `server = "https://user:hunter2@a.example"`, "host a.example has more than a path"},
		{"query", `server = "https://a.example?x=hunter2"`, "host a.example has more than a path"},
		{"bad URL", `server = "https://user:hunter2@a.example:x"`, "cannot be read"},
		{"ca of a number", "ca = 5", "give a text or a list"},
		{"ca of numbers", "ca = [5]", "give texts"},
		{"ca absent", `ca = "x.pem"`, "x.pem"},
		{"ca empty", `ca = "empty.pem"`, "no certificate"},
		{"client without key", `client = "cert.pem"`, "client cert.pem"},
		{"client of three", `client = [["a", "b", "c"]]`, "a pair is"},
		{"client of a number", "client = true", "client"},
		{"header of a table", "[header]\nx = {y = \"hunter2\"}", "header x"},
		{"header with a newline", "[header]\nx = \"hunter2\\n\"", "header X"},
		{"header of the request", "[header]\nrange = \"bytes=0-1\"", `"Range"`},
		{"header name", "[header]\n\"a b\" = \"x\"", `"a b"`},
		{"dial timeout", `dial_timeout = "soon"`, "dial_timeout"},
		{"negative dial timeout", `dial_timeout = "-1s"`, "dial_timeout"},
		{"many hosts", manyHosts(maxHosts + 1), "more than 256 hosts"},
		{"long", "# " + strings.Repeat("x", maxText), "longer than 65536 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, map[string]string{"r.example/hosts.toml": tc.text, "r.example/empty.pem": "x", "r.example/cert.pem": cert})
			var log bytes.Buffer
			tree := New([]string{dir}, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
			hosts := tree.Hosts("r.example")
			out := strings.ReplaceAll(log.String(), `\"`, `"`)
			if len(hosts) != 0 || !strings.Contains(out, tc.want) || !strings.Contains(out, "level=ERROR") {
				t.Errorf("hosts %s, log %s", tell(hosts), out)
			}
			if strings.Contains(out, "hunter2") {
				t.Errorf("a secret in the log: %s", out)
			}
		})
	}
}

func manyHosts(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "[host.\"h%d\"]\n", i)
	}
	return b.String()
}

func manyKeys(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "x%03d = 1\n", i)
	}
	return b.String()
}

// TestUnknown has keys that nobody knows, and as many as fit.
func TestUnknown(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"server = \"a\"\nSkip_Verify = true\nheader = {a = \"b\"}\n[host.\"h\".header]\nc = \"d\"\n", ""},
		{"sever = \"a\"\n[host.\"h\"]\nrewrite = 1\n", "host.h.rewrite,sever"},
		{"[plugins.\"cri\"]\na = 1\nb = 2\n", "plugins.cri"},
		{"[[host.\"h\".extra]]\na = 1\n[host.\"h\"]\ndial_timeout = \"1s\"", "host.h.extra"},
		{"host.\"h\".ca = \"x\"\n", "host.\"h\" (write a table: [host.\"h\"])"},
		{manyKeys(4 * maxUnknown), strings.Join(strings.Fields(strings.ReplaceAll(manyKeys(maxUnknown), " = 1", "")), ",")},
	} {
		f, err := parse([]byte(tc.text))
		if err != nil {
			t.Errorf("%q: %v", tc.text, err)
		} else if got := strings.Join(f.unknown, ","); got != tc.want {
			t.Errorf("%q: unknown %q, want %q", tc.text, got, tc.want)
		}
	}
}

// again lets the next call look at the files.
func (t *Tree) again(name string) []*registry.Host {
	t.mu.Lock()
	t.known[name].checked = time.Time{}
	t.mu.Unlock()
	return t.Hosts(name)
}

// TestReload edits a tree that is in use.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	cert, _ := certificate(t)
	var log bytes.Buffer
	tree := New([]string{dir}, Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
	if hosts := tree.Hosts("r.example"); len(hosts) != 0 || log.Len() != 0 {
		t.Fatalf("hosts %s, log %s", tell(hosts), &log)
	}
	file := "r.example/hosts.toml"
	write(t, dir, map[string]string{file: "[host.\"https://a.example\"]\nca = \"ca.pem\"\nwhat = 1\n", "r.example/ca.pem": cert})
	if hosts := tree.Hosts("r.example"); len(hosts) != 0 {
		t.Errorf("files are read again within a second: %s", tell(hosts))
	}
	good := tree.again("r.example")
	if len(good) != 2 || strings.Count(log.String(), "host.https://a.example.what") != 1 {
		t.Fatalf("hosts %s, log %s", tell(good), &log)
	}
	log.Reset()
	if hosts := tree.again("r.example"); !reflect.DeepEqual(pointers(hosts), pointers(good)) || log.Len() != 0 {
		t.Errorf("without a change: %s, log %s", tell(hosts), &log)
	}
	write(t, dir, map[string]string{file: "[host."})
	for range 3 {
		if hosts := tree.again("r.example"); !reflect.DeepEqual(pointers(hosts), pointers(good)) {
			t.Errorf("a broken file changed the hosts to %s", tell(hosts))
		}
	}
	if n := strings.Count(log.String(), "the last good one stays in force"); n != 1 {
		t.Errorf("%d messages: %s", n, &log)
	}
	write(t, dir, map[string]string{file: "[host.\"https://a.example\"]\nca = \"ca.pem\"\n"})
	second := tree.again("r.example")
	other, _ := certificate(t)
	write(t, dir, map[string]string{"r.example/ca.pem": other})
	third := tree.again("r.example")
	if len(second) != 2 || len(third) != 2 || second[0] == third[0] {
		t.Errorf("a renewed authority is not read: %s, %s", tell(second), tell(third))
	}
	if err := os.RemoveAll(filepath.Join(dir, "r.example")); err != nil {
		t.Fatal(err)
	}
	if hosts := tree.again("r.example"); len(hosts) != 0 {
		t.Errorf("without a directory: %s", tell(hosts))
	}
}

func pointers(hosts []*registry.Host) []string {
	var list []string
	for _, h := range hosts {
		list = append(list, fmt.Sprintf("%p", h))
	}
	return list
}

// TestNames asks for names that are no directories of a tree.
func TestNames(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"root/x": "a file", "hosts.toml": `server = "https://outside"`})
	tree := New([]string{filepath.Join(dir, "root"), filepath.Join(dir, "root/x")}, Options{})
	for _, name := range []string{"..", ".", "", "a/../..", "/", "..:1", "x:y:z"} {
		if hosts := tree.Hosts(name); len(hosts) != 0 {
			t.Errorf("%q: %s", name, tell(hosts))
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("server = \"https://a\"\nca = [\"x\"]\n[host.\"https://b\"]\nclient = [[\"a\", \"b\"]]\n[host.\"https://b\".header]\nx = [\"y\"]\n"))
	f.Add([]byte("[host]\n\"https://a\" = {capabilities = [\"pull\"]}\n"))
	f.Add([]byte("header = {a = \"\\u0000\"}\nunknown = 1\n"))
	f.Add([]byte(manyKeys(100)))           // thousands took minutes once
	f.Add([]byte(manyHosts(maxHosts + 1))) // as well
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := parse(text)
		if err != nil {
			return
		}
		none := func(string) ([]byte, error) { return nil, os.ErrNotExist }
		for _, address := range append(p.order, p.Server) {
			h, err := p.Hosts[address].host(address, none)
			if err != nil {
				continue
			}
			req, err := http.NewRequest(http.MethodGet, h.Scheme+"://"+h.Name, nil)
			if err != nil || req.URL.Host != h.Name || strings.HasSuffix(h.Path, "/") {
				t.Errorf("%q became %s (%v)", address, tell([]*registry.Host{h}), err)
			}
		}
	})
}
