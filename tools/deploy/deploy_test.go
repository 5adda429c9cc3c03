// Package deploy holds files for users; its tests compare them with each other and
// with what containerd, Kata Containers, kata-deploy, Kubernetes and systemd read.
package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"go.yaml.in/yaml/v3"
)

type table = map[string]any

func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func parseTOML(t *testing.T, what string, text []byte) table {
	t.Helper()
	out := table{}
	if err := toml.Unmarshal(text, &out); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return out
}

// leaves are the keys of a table's values, sorted; those of an array of tables
// as if it were one table.
func leaves(t table) []string {
	var out []string
	for k, v := range t {
		subs := []any{v}
		if list, ok := v.([]any); ok && len(list) > 0 && reflect.TypeOf(list[0]) == reflect.TypeFor[table]() {
			subs = list
		}
		for _, s := range subs {
			sub, ok := s.(table)
			if !ok {
				out = append(out, k)
				continue
			}
			for _, l := range leaves(sub) {
				out = append(out, k+"/"+l)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func at(t table, keys ...string) any {
	for _, k := range keys[:len(keys)-1] {
		t, _ = t[k].(table)
	}
	return t[keys[len(keys)-1]]
}

// Keys of containerd's configuration: of version 2 from 1.7.27
// (services/server/config/config.go, pkg/cri/config/config.go), of version 3 from
// 2.4 (cmd/containerd/server/config/config.go, internal/cri/config/config.go). A
// * stands for a name.
var containerdKeys = map[string][]string{
	"config-v2.toml": {
		"version", "proxy_plugins/*/type", "proxy_plugins/*/address",
		"plugins/io.containerd.grpc.v1.cri/containerd/disable_snapshot_annotations",
		"plugins/io.containerd.grpc.v1.cri/containerd/discard_unpacked_layers",
		"plugins/io.containerd.grpc.v1.cri/containerd/runtimes/*/runtime_type",
		"plugins/io.containerd.grpc.v1.cri/containerd/runtimes/*/runtime_path",
		"plugins/io.containerd.grpc.v1.cri/containerd/runtimes/*/snapshotter",
		"plugins/io.containerd.grpc.v1.cri/containerd/runtimes/*/privileged_without_host_devices",
		"plugins/io.containerd.grpc.v1.cri/containerd/runtimes/*/pod_annotations",
		"plugins/io.containerd.grpc.v1.cri/containerd/runtimes/*/options/ConfigPath", // runtimeoptions/v1/api.proto
	},
	"config-v3.toml": {
		"version", "proxy_plugins/*/type", "proxy_plugins/*/address",
		"proxy_plugins/*/exports/root", "proxy_plugins/*/exports/enable_remote_snapshot_annotations",
		"plugins/io.containerd.cri.v1.images/disable_snapshot_annotations",
		"plugins/io.containerd.cri.v1.images/discard_unpacked_layers",
		"plugins/io.containerd.cri.v1.images/runtime_platforms/*/snapshotter",
		"plugins/io.containerd.transfer.v1.local/unpack_config/platform", // plugins/transfer/plugin.go
		"plugins/io.containerd.transfer.v1.local/unpack_config/snapshotter",
		"plugins/io.containerd.transfer.v1.local/unpack_config/differ",
		"plugins/io.containerd.cri.v1.runtime/containerd/runtimes/*/runtime_type",
		"plugins/io.containerd.cri.v1.runtime/containerd/runtimes/*/runtime_path",
		"plugins/io.containerd.cri.v1.runtime/containerd/runtimes/*/snapshotter",
		"plugins/io.containerd.cri.v1.runtime/containerd/runtimes/*/privileged_without_host_devices",
		"plugins/io.containerd.cri.v1.runtime/containerd/runtimes/*/pod_annotations",
		"plugins/io.containerd.cri.v1.runtime/containerd/runtimes/*/options/ConfigPath",
	},
}

func TestContainerd(t *testing.T) {
	sockets, _ := hostSettings(t)
	for name, known := range containerdKeys {
		cfg := parseTOML(t, name, read(t, filepath.Join("containerd", name)))
		var patterns []string
		for _, k := range known {
			patterns = append(patterns, strings.ReplaceAll(regexp.QuoteMeta(k), `\*`, `[a-z-]+`))
		}
		all := regexp.MustCompile("^(" + strings.Join(patterns, "|") + ")$")
		for _, k := range leaves(cfg) {
			if !all.MatchString(k) {
				t.Errorf("%s: containerd has no key %s", name, k)
			}
		}
		for s, p := range cfg["proxy_plugins"].(table) {
			if a := at(p.(table), "address"); a != sockets[s] {
				t.Errorf("%s: snapshotter %s is at %v; host.toml says %s", name, s, a, sockets[s])
			}
		}
	}
}

// In version 3, pulls and containers of a handler have one snapshotter, which is
// a proxy plugin.
func TestSnapshotters(t *testing.T) {
	cfg := parseTOML(t, "v3", read(t, "containerd/config-v3.toml"))
	platforms := at(cfg, "plugins", "io.containerd.cri.v1.images", "runtime_platforms").(table)
	runtimes := at(cfg, "plugins", "io.containerd.cri.v1.runtime", "containerd", "runtimes").(table)
	if len(runtimes) != 3 || len(platforms) != len(runtimes) {
		t.Fatalf("%d handlers, %d for pulls", len(runtimes), len(platforms))
	}
	for h, r := range runtimes {
		s, _ := at(r.(table), "snapshotter").(string)
		if at(platforms, h, "snapshotter") != s || at(cfg, "proxy_plugins", s, "type") != "snapshot" {
			t.Errorf("handler %s: snapshotter %q, for pulls %v", h, s, at(platforms, h, "snapshotter"))
		}
	}
	for _, handlers := range [][]string{classes(t), slices.Collect(maps.Keys(values(t)))} {
		if slices.Sort(handlers); !slices.Equal(handlers, slices.Sorted(maps.Keys(runtimes))) {
			t.Errorf("handlers %q", handlers)
		}
	}
}

// hostSettings returns the sockets of host.toml's snapshotters by name.
func hostSettings(t *testing.T) (sockets map[string]string, cfg table) {
	cfg = parseTOML(t, "host.toml", read(t, "host.toml"))
	sockets = map[string]string{}
	for _, s := range cfg["snapshotter"].([]any) {
		name := s.(table)["name"].(string)
		sockets[name] = filepath.Join(cfg["state"].(string), name+".sock")
	}
	return sockets, cfg
}

// dropIns says for which of Kata's base files, and shims, a drop-in is.
var dropIns = map[string]string{
	"qemu-runtime-rs-guest.toml": "qemu-runtime-rs", "qemu-runtime-rs-block.toml": "qemu-runtime-rs", "qemu-guest.toml": "qemu",
	"qemu-runtime-rs-nydus.toml": "qemu-runtime-rs", "qemu-nydus.toml": "qemu",
	"clh-guest.toml": "clh-runtime-rs", "dragonball-guest.toml": "dragonball", "firecracker-guest.toml": "rs-fc",
}

func TestKata(t *testing.T) {
	known := map[string]bool{}
	for line := range strings.Lines(string(read(t, "testdata/kata-keys.txt"))) {
		known[strings.TrimSpace(line)] = true
	}
	files, err := filepath.Glob("kata/*.toml")
	if err != nil || len(files) != len(dropIns) {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		base := dropIns[filepath.Base(f)]
		text := read(t, f)
		for _, k := range leaves(parseTOML(t, f, text)) {
			if !known[base+" "+strings.ReplaceAll(k, "/", ".")] {
				t.Errorf("%s: configuration-%s.toml has no key %s", f, base, k)
			}
		}
		if !bytes.Contains(text, []byte("configuration-"+base+".toml")) {
			t.Errorf("%s does not say for which file it is", f)
		}
	}
}

// values returns kata-deploy's custom runtimes by handler.
func values(t *testing.T) map[string]customRuntime {
	t.Helper()
	v := decodeYAML[chart](t, "kata-deploy/values.yaml")[0]
	out := map[string]customRuntime{}
	for name, r := range v.CustomRuntimes.Runtimes {
		class := decodeText[runtimeClass](t, name, []byte(r.RuntimeClass))[0]
		if class.Handler != name || class.Metadata.Name != name {
			t.Errorf("custom runtime %s has the class %+v", name, class)
		}
		out[class.Handler] = r
	}
	return out
}

// chart has the keys of kata-deploy's values.yaml (Kata 4.1.0) that are used.
type chart struct {
	CustomRuntimes struct {
		Enabled  bool
		Runtimes map[string]customRuntime
	} `yaml:"customRuntimes"`
	Containerd struct {
		UserDropIn string `yaml:"userDropIn"`
	}
}

type customRuntime struct {
	BaseConfig   string `yaml:"baseConfig"`
	DropIn       string `yaml:"dropIn"`
	RuntimeClass string `yaml:"runtimeClass"`
	Containerd   struct{ Snapshotter string }
}

// What kata-deploy is given says the same as the files for a hand.
func TestKataDeploy(t *testing.T) {
	v := decodeYAML[chart](t, "kata-deploy/values.yaml")[0]
	v3 := parseTOML(t, "v3", read(t, "containerd/config-v3.toml"))
	for name, r := range values(t) {
		if want := at(v3, "plugins", "io.containerd.cri.v1.images", "runtime_platforms", name, "snapshotter"); r.Containerd.Snapshotter != want {
			t.Errorf("%s: snapshotter %q, not %v", name, r.Containerd.Snapshotter, want)
		}
		want := table{}
		if file := filepath.Join("kata", r.BaseConfig+map[string]string{"kata-tatami": "-guest", "kata-tatami-block": "-block"}[name]+".toml"); name != "kata-tatami-share" {
			want = parseTOML(t, file, read(t, file))
		}
		if got := parseTOML(t, name, []byte(r.DropIn)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: drop-in %v, not %v", name, got, want)
		}
	}
	// kata-deploy writes the handlers itself.
	plugins := v3["plugins"].(table)
	delete(plugins, "io.containerd.cri.v1.runtime")
	delete(plugins["io.containerd.cri.v1.images"].(table), "runtime_platforms")
	if got := parseTOML(t, "userDropIn", []byte(v.Containerd.UserDropIn)); !reflect.DeepEqual(got, v3) || !v.CustomRuntimes.Enabled {
		t.Errorf("userDropIn %v, not %v", got, v3)
	}
}

type runtimeClass struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   struct{ Name string }
	Handler    string
	Overhead   struct {
		PodFixed map[string]string `yaml:"podFixed"`
	}
	Scheduling struct {
		NodeSelector map[string]string `yaml:"nodeSelector"`
	}
}

type pod struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   struct {
		Name        string
		Annotations map[string]string
	}
	Spec struct {
		RuntimeClassName string `yaml:"runtimeClassName"`
		Containers       []struct {
			Name, Image string
			Command     []string
			Ports       []struct {
				ContainerPort int `yaml:"containerPort"`
			}
		}
	}
}

// classes are the handlers of the RuntimeClasses.
func classes(t *testing.T) []string {
	var out []string
	for _, c := range decodeYAML[runtimeClass](t, "kubernetes/runtimeclass.yaml") {
		if c.APIVersion != "node.k8s.io/v1" || c.Kind != "RuntimeClass" || c.Metadata.Name != c.Handler {
			t.Errorf("%+v", c)
		}
		out = append(out, c.Handler)
	}
	return out
}

func TestPod(t *testing.T) {
	p := decodeYAML[pod](t, "kubernetes/pod.yaml")[0]
	class := p.Spec.RuntimeClassName
	if p.Kind != "Pod" || !slices.Contains(classes(t), class) || p.Metadata.Annotations["io.containerd.cri.runtime-handler"] != class {
		t.Errorf("%+v", p)
	}
}

func decodeYAML[T any](t *testing.T, name string) []T { return decodeText[T](t, name, read(t, name)) }

// decodeText decodes documents; unknown and repeated keys are errors.
func decodeText[T any](t *testing.T, name string, text []byte) (out []T) {
	t.Helper()
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	for {
		var v T
		err := d.Decode(&v)
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out = append(out, v)
	}
}

// systemd itself reads the unit; the program need not be installed.
func TestUnit(t *testing.T) {
	text := read(t, "systemd/tatami-host.service")
	unit := filepath.Join(t.TempDir(), "tatami-host.service")
	if err := os.WriteFile(unit, bytes.Replace(text, []byte("/opt/tatami/bin/tatami-host"), []byte("/bin/true"), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--recursive-errors=no", unit).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze: %v\n%s", err, out)
	}
	// Any of these gives the service a mount namespace, out of which no mount
	// comes, or takes /dev/fuse away (systemd.exec(5)).
	hides := regexp.MustCompile(`(?m)^(Private\w*|Protect\w*|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths|ExecPaths|NoExecPaths|` +
		`TemporaryFileSystem|BindPaths|BindReadOnlyPaths|RootDirectory|RootImage|MountFlags|MountAPIVFS|DynamicUser|RuntimeDirectory|DeviceAllow|DevicePolicy)=`)
	if found := hides.FindAllString(string(text), -1); found != nil {
		t.Errorf("%q", found)
	}
	for _, want := range []string{"Type=notify", "ExecReload=/bin/kill -HUP $MAINPID", "KillMode=mixed", "FileDescriptorStoreMax=", "WantedBy=multi-user.target"} {
		if !bytes.Contains(text, []byte("\n"+want)) {
			t.Errorf("no line %s", want)
		}
	}
}

// Files that install.md names are there, and it names all.
func TestInstall(t *testing.T) {
	text := string(read(t, "install.md"))
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.HasPrefix(name, "testdata/") && !strings.HasSuffix(name, ".go") && name != "install.md" &&
			!strings.HasPrefix(name, "kata/") && !strings.Contains(text, name) {
			err = fmt.Errorf("install.md does not name %s", name)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	for _, name := range regexp.MustCompile(`\b(containerd|kata|kubernetes|systemd|kata-deploy)/[a-z0-9-]+\.(toml|yaml|service)\b`).FindAllString(text, -1) {
		if _, err := os.Stat(name); err != nil && !strings.HasPrefix(name, "containerd/config.toml") {
			t.Error(err)
		}
	}
}
