package config

import (
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// hubFile is what a pod's initdata may have for a Confidential Data Hub
// (guest-components: confidential-data-hub/example.config.toml), with settings
// for us.
const hubFile = `
socket = "unix:///run/confidential-containers/cdh.sock"

[kbc]
name = "cc_kbc"
url = "http://example.io:8080"
kbs_cert = """
line one
line two
"""

[[credentials]]
resource_uri = "kbs:///default/key/1"
path = "/run/key"

[image]
max_concurrent_layer_downloads_per_image = 3

[tatami]
version = 1
trust = "image"
listen = ["unix:/only"]

[tatami.net]
dns = ["1.1.1.1"]
`

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestHubFile(t *testing.T) {
	own := write(t, "guest.toml", "version = 1\ntrust = \"host\"\nhostname = \"own\"\nlisten = [\"unix:/a\", \"unix:/b\"]\nlog_level = \"debug\"\n")
	hub := write(t, "cdh.toml", hubFile)
	c, rest, err := Load([]string{"--config", own, "--log-level", "warn", "-c", hub, "worker"}, "tatami.net.dns=9.9.9.9", io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Hostname, want.Trust, want.Listen, want.LogLevel = "own", "image", []string{"unix:/only"}, "warn"
	want.Net.DNS = []string{"9.9.9.9"}
	want.CDHConfig = hub
	if !reflect.DeepEqual(*c, want) || !reflect.DeepEqual(rest, []string{"worker"}) {
		t.Errorf("got  %+v %q\nwant %+v", *c, rest, want)
	}
}

func TestHubFileWithoutUs(t *testing.T) {
	hub := write(t, "cdh.toml", "[kbc]\nname = \"cc_kbc\"\n")
	own := write(t, "guest.toml", "version = 1\n")
	c, _, err := Load([]string{"--config", own, "--cdh-config", hub}, "", io.Discard)
	if err != nil || c.Trust != Default().Trust || c.Version != Version {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestHubFileRefused(t *testing.T) {
	own := write(t, "guest.toml", "version = 1\n")
	for _, c := range []struct{ name, file, want string }{
		{"unknown key of ours", "[kbc]\nname = \"x\"\n[tatami]\nversion = 1\nstore_sise = 3", `unknown key "tatami.store_sise"`},
		{"unknown table of ours", "[tatami]\nversion = 1\n[tatami.network]\nmtu = 3", `unknown key "tatami.network`},
		{"no version", "[tatami]\ntrust = \"image\"", "[tatami]: version is 0"},
		{"no table", "tatami = 3", "cdh.toml"},
		{"wrong type beside unknown keys", "x = 1\n[tatami]\nversion = 1\nrunner = \"yes\"", "cdh.toml"},
		{"invalid value", "[tatami]\nversion = 1\ntrust = \"none\"", "trust"},
		{"no toml", "[tatami", "cdh.toml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := Load([]string{"--config", own, "-c", write(t, "cdh.toml", c.file)}, "", io.Discard)
			if err == nil || !strings.Contains(err.Error(), c.want) || !errdefs.IsInvalidArgument(err) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
		})
	}
}

func TestForwardRefused(t *testing.T) {
	for _, args := range [][]string{
		{"--cdh-forward-config", "/x"},
		{"--cdh-forward", Default().CDHSocket},
		{"--cdh-forward", "/hub", "--cdh-forward-config", "x"},
	} {
		if _, _, err := load(t, "version = 1", "", args...); err == nil || !strings.Contains(err.Error(), "cdh_forward") {
			t.Errorf("%q: error %v", args, err)
		}
	}
}

func TestHubConfig(t *testing.T) {
	for _, c := range []struct {
		name, file, cmdline string
		want                map[string]any
	}{
		{"of a pod", hubFile, "agent.aa_kbc_params=no::no", map[string]any{
			"socket":      "unix:///run/hub.sock",
			"kbc":         map[string]any{"name": "cc_kbc", "url": "http://example.io:8080", "kbs_cert": "line one\nline two\n"},
			"credentials": []any{map[string]any{"resource_uri": "kbs:///default/key/1", "path": "/run/key"}},
			"image":       map[string]any{"max_concurrent_layer_downloads_per_image": int64(3)},
		}},
		{"of the kernel command line", "", "quiet agent.aa_kbc_params=cc_kbc::http://kbs:8080", map[string]any{
			"socket": "unix:///run/hub.sock", "kbc": map[string]any{"name": "cc_kbc", "url": "http://kbs:8080"},
		}},
		{"of nobody", "", "", map[string]any{
			"socket": "unix:///run/hub.sock", "kbc": map[string]any{"name": "offline_fs_kbc", "url": ""},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := HubConfig("cdh.toml", []byte(c.file), "/run/hub.sock", c.cmdline)
			if err != nil {
				t.Fatal(err)
			}
			var got map[string]any
			if err := toml.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(got, c.want) {
				t.Errorf("%v\n%s", err, b)
			}
		})
	}
	if _, err := HubConfig("cdh.toml", []byte("["), "/x", ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("error %v", err)
	}
}

func FuzzHubFile(f *testing.F) {
	f.Add(hubFile, "agent.aa_kbc_params=a::b::c")
	f.Add("[tatami]\nversion=1\n[[tatami.net]]", "agent.aa_kbc_params=")
	f.Add("tatami.version = 1\n\"tatami\".\"net\".dns = []", `"agent.aa_kbc_params=a b::c"`)
	f.Add("a = 1979-05-27T07:32:00Z\nb = nan\n[c]\nd = [[], [{}]]", "")
	f.Fuzz(func(t *testing.T, file, cmdline string) {
		c := Default()
		if c.parseCDH("fuzz", []byte(file)) == nil {
			_ = c.validate() // must not panic; most files are not valid
		}
		b, err := HubConfig("fuzz", []byte(file), "/run/hub.sock", cmdline)
		if err != nil {
			return
		}
		var got struct {
			Socket string
			Tatami any
		}
		if err := toml.Unmarshal(b, &got); err != nil || got.Socket != "unix:///run/hub.sock" || got.Tatami != nil {
			t.Fatalf("%v: %q of %q", err, b, file)
		}
	})
}
