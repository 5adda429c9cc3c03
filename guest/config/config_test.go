package config

import (
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func load(t *testing.T, file, cmdline string, args ...string) (*Config, []string, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "guest.toml")
	if err := os.WriteFile(name, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(append([]string{"--config", name}, args...), cmdline, io.Discard)
}

func TestLaterOverridesEarlier(t *testing.T) {
	c, rest, err := load(t, `
version = 1
listen = ["unix:/a", "unix:/b"]
store_memory = 4194304
trust = "image"
registry = true
plain_http = ["localhost:5000"]
credentials = ["/a", "/b"]
[net]
address = "10.0.2.15/24"
dns = ["10.0.2.3"]
`, `quiet tatami.store-memory=8M tatami.hostname="a b" panic=-1 tatami.runner tatami.net.dns=1.1.1.1,9.9.9.9`+"\n",
		"--registry=false", "--store-memory", "6M", "--listen", "unix:/c", "--listen", "unix:/d,unix:/e", "worker", "--x")
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Listen = []string{"unix:/c", "unix:/d", "unix:/e"}
	want.StoreMemory = 8 << 20
	want.Trust = "image"
	want.Registry = false
	want.PlainHTTP = []string{"localhost:5000"}
	want.Credentials = []string{"/a", "/b"}
	want.Hostname = "a b"
	want.Runner = true
	want.Net = Net{Address: "10.0.2.15/24", DNS: []string{"1.1.1.1", "9.9.9.9"}}
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("got  %+v\nwant %+v", *c, want)
	}
	if !reflect.DeepEqual(rest, []string{"worker", "--x"}) {
		t.Errorf("rest = %q", rest)
	}
}

// TestDefaults holds the documented file against the code.
func TestDefaults(t *testing.T) {
	b, err := os.ReadFile("guest.toml")
	if err != nil {
		t.Fatal(err)
	}
	c, _, err := load(t, string(b), "")
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	c.PlainHTTP, c.Credentials, c.Net.DNS = nil, nil, nil // empty and absent are the same
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("got  %+v\nwant %+v", *c, want)
	}
	for _, s := range want.settings() {
		if key := s.key[strings.LastIndexByte(s.key, '.')+1:]; !strings.Contains(string(b), "\n"+key+" = ") {
			t.Errorf("%s is not documented", s.key)
		}
	}
}

func TestEverySettingHasAKeyInTheFile(t *testing.T) {
	var c Config
	for _, s := range c.settings() {
		line := s.key + ` = 0.5`
		err := c.parseFile("x", []byte("version = 1\n"+line))
		if err == nil || strings.Contains(err.Error(), "unknown key") {
			t.Errorf("%s: %v", s.key, err)
		}
	}
}

func TestRefused(t *testing.T) {
	cases := []struct {
		name, file, cmdline string
		args                []string
		want                string
	}{
		{name: "unknown key", file: "version = 1\nstore_sise = 3", want: `guest.toml: unknown key "store_sise"`},
		{name: "unknown table key", file: "version = 1\n[net]\nmtu = 3", want: `unknown key "net.mtu"`},
		{name: "no version", file: "runner = true", want: "version is 0"},
		{name: "later version", file: "version = 2", want: "version is 2"},
		{name: "no toml", file: "version = ", want: "guest.toml"},
		{name: "unknown flag", file: "version = 1", args: []string{"--lisen", "x"}, want: "lisen"},
		{name: "unknown word", file: "version = 1", cmdline: "tatami.lisen=x", want: `unknown key "tatami.lisen"`},
		{name: "bad address", file: "version = 1\nlisten = [\"tcp:1\"]", want: "listen"},
		{name: "no address", file: "version = 1\nlisten = []", want: "listen is empty"},
		{name: "relative path", file: "version = 1\nstate_dir = \"x\"", want: "state_dir"},
		{name: "no state", file: "version = 1\nstate_dir = \"\"", want: "state_dir"},
		{name: "mount path", file: "version = 1\nmount_path = \"nbd\"", want: "mount_path"},
		{name: "trust", file: "version = 1\ntrust = \"none\"", want: "trust"},
		{name: "virtio-fs", file: "version = 1\nvirtiofs = \"on\"", want: "virtiofs"},
		{name: "relative credentials", file: "version = 1\ncredentials = [\"x\"]", want: "credentials"},
		{name: "relative share", file: "version = 1\nvirtiofs_dirs = [\"x\"]", want: "virtiofs_dirs"},
		{name: "long share", file: "version = 1", cmdline: "tatami.virtiofs_dirs=/" + strings.Repeat("x", 200), want: "virtiofs_dirs"},
		{name: "level", file: "version = 1\nlog_level = \"loud\"", want: "log_level"},
		{name: "memory", file: "version = 1\nstore_memory = 1", want: "store_memory"},
		{name: "patience", file: "version = 1", cmdline: "tatami.patience=long", want: "tatami.patience"},
		{name: "endless patience", file: "version = 1", args: []string{"--patience", "2h"}, want: "patience is 2h0m0s"},
		{name: "size flag", file: "version = 1", args: []string{"--store-memory", "9223372036854775807G"}, want: "store-memory"},
		{name: "bool word", file: "version = 1", cmdline: "tatami.runner=perhaps", want: "tatami.runner"},
		{name: "net address", file: "version = 1\n[net]\naddress = \"10.0.2.15\"", want: "prefix length"},
		{name: "dns", file: "version = 1\n[net]\ndns = [\"dns.example\"]", want: "net.dns"},
		{name: "runner without streams", file: "version = 1\nrunner = true\nstream_listen = \"\"", want: "stream_listen"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := load(t, c.file, c.cmdline, c.args...)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q in it", err, c.want)
			}
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("class of %v", err)
			}
		})
	}
}

func TestMissingFile(t *testing.T) {
	for _, flag := range []string{"--config", "--cdh-config", "-c"} {
		if _, _, err := Load([]string{flag, "/does/not/exist"}, "", io.Discard); err == nil {
			t.Errorf("%s with a file that is missing was accepted", flag)
		}
	}
}

func TestHelp(t *testing.T) {
	var usage strings.Builder
	_, _, err := Load([]string{"--help"}, "", &usage)
	if !errors.Is(err, flag.ErrHelp) || !strings.Contains(usage.String(), "relay-address") {
		t.Errorf("error %v, usage %q", err, usage.String())
	}
}

func TestSplitCmdline(t *testing.T) {
	got := splitCmdline(`a  b="c d" "e f=g" h` + "\x00\n")
	want := []string{"a", "b=c d", "e f=g", "h"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add("version = 1\nlisten = [\"vsock:1\"]\n[net]\naddress=\"::1/3\"", "tatami.listen=unix:/a,, tatami.net.dns=\"::1\"")
	f.Add("version = 9223372036854775807", "tatami. tatami.= =tatami.x \"")
	f.Fuzz(func(t *testing.T, file, cmdline string) {
		c := Default()
		if c.parseFile("fuzz", []byte(file)) != nil {
			return
		}
		if c.parseCmdline(cmdline) != nil || c.validate() != nil {
			return
		}
		// What was accepted must be accepted again from its own keys.
		again := Default()
		for _, s := range c.settings() {
			for _, a := range again.settings() {
				if a.key == s.key && a.value.Set(s.value.String()) != nil {
					t.Fatalf("%s: %q was accepted once only", s.key, s.value)
				}
			}
		}
		if err := again.validate(); err != nil {
			t.Fatalf("not valid again: %v", err)
		}
	})
}
