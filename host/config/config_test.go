package config

import (
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

func TestDecode(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       func(*Config) // over the defaults
		err        string
	}{
		{name: "smallest", text: "version = 1\n", want: func(*Config) {}},
		{name: "all", text: `version = 1
root = "/srv/t"
socket = "/run/t.sock"
images_socket = "/run/i.sock"
idle_exit = true
class = "batch"
[log]
level = "debug"
format = "text"
[registry]
plain_http = ["a:5000", "b"]
config_path = "/a:/b"
credentials = "/c.json:/secrets"
credential_provider_bin_dir = "/bin"
layers = 2
ranges = 3
[relay]
requests = 5
stall = "7s"
[mirror]
address = "[::1]:5055"
blobs = "3G"
[store]
size = "7G"
high = 90
low = 80
pinned = ["a:1", "b"]
[kata]
discover = true
run_dirs = ["/run/a"]
host_port = 3000
relay_port = 3001
containerd_state = "/run/k3s/containerd"
[schedule]
enabled = false
link = "10gbit"
[classes.batch]
share = 10
ceiling = "50%"
match = ["runtime=kata-batch"]
[classes.mid]
share = 30
floor = "20MB"
fill = "none"
[metrics]
address = "127.0.0.1:9110"
[profile]
record = "5s"
push = true
budget = "8M"
`, want: func(c *Config) {
			c.Root, c.Socket, c.ImagesSocket, c.IdleExit, c.Class = "/srv/t", "/run/t.sock", "/run/i.sock", true, "batch"
			c.Log = Log{Level: "debug", Format: "text"}
			c.Registry = Registry{
				PlainHTTP: []string{"a:5000", "b"}, ConfigPath: "/a:/b",
				Credentials: "/c.json:/secrets", ProviderBinDir: "/bin", Layers: 2, Ranges: 3,
			}
			c.Relay = Relay{Requests: 5, Stall: Duration(7 * time.Second)}
			c.Mirror = Mirror{Address: "[::1]:5055", Blobs: 3 << 30}
			c.Store = Store{Size: "7G", High: 90, Low: 80, Pinned: []string{"a:1", "b"}}
			c.Kata = Kata{Discover: true, RunDirs: []string{"/run/a"}, HostPort: 3000, RelayPort: 3001, ContainerdState: "/run/k3s/containerd"}
			c.Schedule = Schedule{Link: Rate{sched.Rate{Bytes: 1_250_000_000}}}
			c.Classes["batch"] = Class{Share: 10, Ceiling: Rate{sched.Rate{Percent: 50}}, Fill: "none", Match: []string{"runtime=kata-batch"}}
			c.Classes["mid"] = Class{Share: 30, Floor: Rate{sched.Rate{Bytes: 20_000_000}}, Fill: "none"}
			c.Metrics = Metrics{Address: "127.0.0.1:9110"}
			c.Profile = Profile{Record: Duration(5 * time.Second), Push: true, Budget: 8 << 20}
		}},
		{name: "no version", text: `root = "/x"`, err: "version is 0: write version = 1"},
		{name: "later version", text: "version = 2", err: "version is 2"},
		{name: "unknown key", text: "version = 1\n\nrot = \"/x\"\n", err: "unknown key rot (line 3)"},
		{name: "unknown table key", text: "version = 1\n[registry]\nlayers = 1\nlayer = 2\n", err: "unknown key registry.layer (line 4)"},
		{name: "unknown table", text: "version = 1\n[relais]\nrequests = 1\n", err: "unknown key relais"},
		{name: "two unknown keys", text: "version = 1\na = 1\nb = 2\n", err: "a (line 2), b (line 3)"},
		{name: "wrong type", text: "version = 1\nroot = 5\n", err: "line 2"},
		{name: "not a duration", text: "version = 1\n[relay]\nstall = \"soon\"\n", err: "line 3"},
		{name: "syntax", text: "version = 1\nroot = \n", err: "line 2"},
		{name: "twice", text: "version = 1\nversion = 1\n", err: "version"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Decode([]byte(tc.text))
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want one with %q", err, tc.err)
				}
				return
			}
			want := Default()
			tc.want(&want)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Fatalf("got %+v, %v\nwant %+v", got, err, want)
			}
		})
	}
}

func TestParse(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "host.toml")
	text := "version = 1\nroot = \"/srv/t\"\n[registry]\nlayers = 2\nplain_http = [\"a\"]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	absent := filepath.Join(dir, "absent.toml")
	for _, tc := range []struct {
		name string
		args []string
		path string
		want func(*Config)
		err  string
	}{
		{name: "no file", path: absent, want: func(c *Config) {
			c.Socket, c.ImagesSocket = "/var/lib/tatami/tatami-host.sock", "/var/lib/tatami/images.sock"
		}},
		{name: "file", path: file, want: func(c *Config) {
			c.Root, c.Socket, c.ImagesSocket = "/srv/t", "/srv/t/tatami-host.sock", "/srv/t/images.sock"
			c.Registry.Layers, c.Registry.PlainHTTP = 2, []string{"a"}
		}},
		{name: "flags win", path: absent, want: func(c *Config) {
			c.Root, c.Socket, c.ImagesSocket = "/x", "/x/tatami-host.sock", "/i"
			c.Registry.Layers, c.Registry.PlainHTTP, c.IdleExit = 9, []string{"b:1", "c"}, true
		}, args: []string{"--config", file, "--root", "/x/", "--layers=9", "--plain-http", "b:1", "--plain-http=c", "--idle-exit", "--images-socket", "/i"}},
		{name: "discover", path: absent, args: []string{"--discover"}, want: func(c *Config) {
			c.Socket, c.ImagesSocket, c.Kata.Discover = "/var/lib/tatami/tatami-host.sock", "/var/lib/tatami/images.sock", true
		}},
		{name: "named file missing", path: file, args: []string{"--config", absent}, err: "open settings"},
		{name: "relative root", path: absent, args: []string{"--root", "x"}, err: "absolute path"},
		{name: "long socket", path: absent, args: []string{"--socket", "/" + strings.Repeat("x", 107)}, err: "at most 107 bytes"},
		{name: "relative socket", path: absent, args: []string{"--images-socket", "x"}, err: "images_socket"},
		{name: "one socket", path: absent, args: []string{"--images-socket", "/x", "--socket", "/x"}, err: "give two paths"},
		{name: "layers", path: absent, args: []string{"--layers", "0"}, err: "registry.layers is 0"},
		{name: "not a number", path: absent, args: []string{"--ranges", "many"}, err: "ranges"},
		{name: "class", path: absent, args: []string{"--class", "bulk"}, err: `class "bulk": give one of online, batch`},
		{name: "level", path: absent, args: []string{"--log-level", "loud"}, err: "log.level"},
		{name: "format", path: absent, args: []string{"--log-format", "xml"}, err: "log.format"},
		{name: "host", path: absent, args: []string{"--plain-http", "http://a"}, err: "plain_http"},
		{name: "credentials", path: absent, args: []string{"--credentials", "c.json"}, err: "credentials"},
		{name: "second place of credentials", path: absent, args: []string{"--credentials", "/a:b"}, err: `registry.credentials "b"`},
		{name: "unknown flag", path: absent, args: []string{"--frob"}, err: "frob"},
		{name: "argument", path: absent, args: []string{"serve"}, err: `"serve"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parse(tc.args, io.Discard, tc.path)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want one with %q", err, tc.err)
				}
				return
			}
			want := Default()
			tc.want(&want)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Fatalf("got %+v, %v\nwant %+v", got, err, want)
			}
		})
	}
}

func TestCRI(t *testing.T) {
	const one = "[[snapshotter]]\nname = \"t\"\nmode = \"guest\"\n"
	for _, tc := range []struct{ name, path, rest, err string }{
		{"good", "/run/tatami-host/cri.sock", one, ""},
		{"off", "", "", ""},
		{"relative", "cri.sock", one, "absolute path"},
		{"long", "/" + strings.Repeat("x", 107), one, "at most 107 bytes"},
		{"no snapshotter", "/c", "", "no snapshotter"},
		{"containerd's", "/run/containerd/containerd.sock", one, "another socket"},
		{"a snapshotter's", "/run/tatami-host/../tatami-host/t.sock", one, "another socket"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Decode([]byte("version = 1\n[cri]\nimage_service = \"" + tc.path + "\"\n" + tc.rest))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.check(); (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want one with %q", err, tc.err)
			}
		})
	}
}

func TestKata(t *testing.T) {
	for _, tc := range []struct{ name, text, err string }{
		{"defaults", "discover = true", ""},
		{"a directory, twice", `run_dirs = ["/run/kata", "/run/kata/"]`, "twice"},
		{"relative", `run_dirs = ["kata"]`, "absolute path"},
		{"no directory", "discover = true\nrun_dirs = []", "has 0 directories"},
		{"no directory, unused", "run_dirs = []", ""},
		{"state", `containerd_state = ""`, "kata.containerd_state"},
		{"agent's port", "host_port = 1024", "kata.host_port is 1024"},
		{"no port", "relay_port = 0", "kata.relay_port is 0"},
		{"any port", "relay_port = 4294967295", "kata.relay_port is 4294967295"},
		{"one port", "relay_port = 2110", "both 2110"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Decode([]byte("version = 1\n[kata]\n" + tc.text))
			if err != nil {
				t.Fatal(err)
			}
			if err := c.check(); (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want one with %q", err, tc.err)
			}
		})
	}
	c := Default()
	c.IdleExit, c.Kata.Discover = true, true
	if err := c.check(); err == nil {
		t.Error("a program that ends by itself may discover")
	}
}

func TestMirror(t *testing.T) {
	for address, ok := range map[string]bool{
		"": true, "127.0.0.1:5055": true, "[::1]:5055": true, "127.1.2.3:1": true,
		"0.0.0.0:5055": false, ":5055": false, "localhost:5055": false, "10.0.0.1:5055": false, "127.0.0.1": false,
		"127.0.0.1:0": false, "[::]:5055": false, "127.0.0.1:http": false, "unix:/x": false,
	} {
		c := Default()
		c.Mirror.Address = address
		if err := c.check(); (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "mirror.address") {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestProfile(t *testing.T) {
	for _, tc := range []struct{ text, err string }{
		{"", ""},
		{`record = "0s"`, ""},
		{`record = "10m"`, ""},
		{`budget = "0"`, ""},
		{`record = "500ms"`, "profile.record is 500ms"},
		{`record = "-1s"`, "profile.record is -1s"},
		{`record = "1h"`, "profile.record is 1h"},
		{`budget = "2G"`, "profile.budget"},
	} {
		c, err := Decode([]byte("version = 1\n[profile]\n" + tc.text))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.check(); (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %v, want an error with %q", tc.text, err, tc.err)
		}
	}
}

func TestHelp(t *testing.T) {
	var b strings.Builder
	if _, err := parse([]string{"-h"}, &b, Path); !errors.Is(err, flag.ErrHelp) {
		t.Fatal(err)
	}
	for _, want := range []string{"-root", "-config", Path} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("usage lacks %q:\n%s", want, b.String())
		}
	}
}

func TestLogger(t *testing.T) {
	var b strings.Builder
	l := Log{Level: "warn", Format: "text"}.Logger(&b)
	l.Info("quiet")
	l.Warn("loud", slog.Int("n", 1))
	if got := b.String(); !strings.Contains(got, "msg=loud n=1") || strings.Contains(got, "quiet") {
		t.Fatalf("logged %q", got)
	}
}

// The example says what the defaults are, and names every setting.
func TestExample(t *testing.T) {
	text, err := os.ReadFile("host.toml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	got.Registry.PlainHTTP, got.Store.Pinned = nil, nil // empty
	for name, c := range got.Classes {
		c.Match = nil // empty
		got.Classes[name] = c
	}
	if want := Default(); !reflect.DeepEqual(got, want) {
		t.Errorf("the example gives %+v, the defaults are %+v", got, want)
	}
	if n, want := strings.Count(string(text), " = "), fields(reflect.TypeFor[Config]())+fields(reflect.TypeFor[Class]())*(len(Default().Classes)-1); n != want {
		t.Errorf("%d settings in the example, there are %d", n, want)
	}
}

// The settings that users copy to a node are understood.
func TestDeployedSettings(t *testing.T) {
	text, err := os.ReadFile("../../tools/deploy/host.toml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Decode(text)
	if err == nil {
		err = c.check()
	}
	if err != nil || len(c.Snapshotters) != 3 || !c.Kata.Discover {
		t.Errorf("%+v, error %v", c, err)
	}
}

// A daemon with more settings is not understood any more.
func TestSettings(t *testing.T) {
	each, class := fields(reflect.TypeFor[Snapshotter]()), fields(reflect.TypeFor[Class]())
	// The version is none.
	if n := fields(reflect.TypeFor[Config]()) - 1 - each - class; n > 35 || each > 7 || class > 5 {
		t.Fatalf("%d settings, %d of a snapshotter and %d of a class; at most 35, 7 and 5 are wanted", n, each, class)
	}
}

func fields(t reflect.Type) int {
	n := 0
	for i := range t.NumField() {
		switch f := t.Field(i).Type; {
		case t.Field(i).Tag.Get("toml") == "-":
		case f.Kind() == reflect.Struct && f != reflect.TypeFor[Rate]():
			n += fields(f)
		case (f.Kind() == reflect.Slice || f.Kind() == reflect.Map) && f.Elem().Kind() == reflect.Struct:
			n += fields(f.Elem())
		default:
			n++
		}
	}
	return n
}

func TestSnapshotters(t *testing.T) {
	const head = "version = 1\n"
	for _, tc := range []struct{ name, text, err string }{
		{"two", `[[snapshotter]]
name = "a"
mode = "guest"
[[snapshotter]]
name = "b"
mode = "block"
allow = ["share"]
fallback = ["share", "full"]
upper_size = "512M"`, ""},
		{"no name", "[[snapshotter]]\nmode = \"guest\"", "name: give lower-case"},
		{"path as name", "[[snapshotter]]\nname = \"../a\"\nmode = \"guest\"", "name: give lower-case"},
		{"no mode", "[[snapshotter]]\nname = \"a\"", "give one of guest, block, share, nydus, full"},
		{"unknown fallback", "[[snapshotter]]\nname = \"a\"\nmode = \"guest\"\nfallback = [\"lazy\"]", "mode \"lazy\""},
		{"size", "[[snapshotter]]\nname = \"a\"\nmode = \"guest\"\nupper_size = \"big\"", "is no size"},
		{"chain IDs", "[[snapshotter]]\nname = \"a\"\nmode = \"guest\"\nchain_ids = \"all\"", "chain_ids \"all\""},
		{"same name", "[[snapshotter]]\nname = \"a\"\nmode = \"guest\"\n[[snapshotter]]\nname = \"a\"\nmode = \"full\"", "another one has its name"},
		{"same socket", "[[snapshotter]]\nname = \"a\"\nmode = \"guest\"\nsocket = \"/var/lib/tatami/tatami-host.sock\"", "another one has its name or socket"},
		{"idle exit", "idle_exit = true\n[[snapshotter]]\nname = \"a\"\nmode = \"full\"", "idle_exit"},
		{"helper", "mount_helper = \"/bin/mount\"", "mount_helper"},
		{"state", "state = \"run\"", "state"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Decode([]byte(head + tc.text))
			if err == nil {
				err = c.check()
			}
			if tc.err == "" && (err != nil || c.Snapshotters[1].UpperSize != 512<<20 || c.Snapshotters[0].Socket != "/run/tatami-host/a.sock") {
				t.Errorf("%+v, error %v", c.Snapshotters, err)
			}
			if tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("error %v, want one with %q", err, tc.err)
			}
		})
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte("version = 1\nroot = \"/x\"\n[relay]\nstall = \"1s\"\n"))
	f.Add([]byte("version = 1\n[registry]\nplain_http = [\"a\", \"b\"]\nlayers = 99\n"))
	f.Add([]byte("[log]\nlevel = \"info\"\nversion = 1"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Decode(text)
		if err != nil {
			return
		}
		if c.check() != nil {
			return
		}
		if again := c; again.check() != nil || !reflect.DeepEqual(again, c) {
			t.Fatalf("checking twice changed %+v into %+v", c, again)
		}
	})
}

// The file for users is taken, and finds containerd and Kata by the defaults.
func TestDeployed(t *testing.T) {
	text, err := os.ReadFile("../../tools/deploy/host.toml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Decode(text)
	if err == nil {
		err = c.check()
	}
	if d := Default(); err != nil || c.Root != d.Root || c.State != d.State || !c.Kata.Discover || c.Kata.ContainerdState != d.Kata.ContainerdState {
		t.Errorf("%+v, %v", c, err)
	}
}
