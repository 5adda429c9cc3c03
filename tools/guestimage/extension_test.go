package guestimage

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/pelletier/go-toml/v2"

	"github.com/tatami-containers/tatami/tests/treecmp"
)

// TestExtensionForTheKernel mounts an extension as a guest does and looks at
// every file.
func TestExtensionForTheKernel(t *testing.T) {
	o := sources(t, Options{Kind: Extension, Arch: "amd64", Config: "version = 1\n", CDH: "hub"})
	root := mounted(t, make1(t, o).File)
	want := map[string]string{
		"usr/bin/tatami-guest":                read(t, o.Guest),
		"usr/local/bin/confidential-data-hub": read(t, o.CDH),
		"pause_bundle/rootfs/pause":           read(t, o.Pause),
		"pause_bundle/config.json":            "",
		"etc/ocicrypt_config.json":            `{"key-providers":{"attestation-agent":{"ttrpc":"unix:///run/confidential-containers/tatami/cdh.sock"}}}` + "\n",
		"etc/kata-extensions/components.toml": "",
		"etc/tatami/guest.toml":               "version = 1\n",
	}
	tree, err := treecmp.Snapshot(root)
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range tree {
		dir := n.Mode&0o170000 == 0o040000
		program := strings.Contains(name, "/bin/") || strings.HasSuffix(name, "/pause")
		if n.UID != 0 || n.GID != 0 || n.Mode&0o777 != map[bool]uint32{true: 0o755, false: 0o644}[dir || program] {
			t.Errorf("%s: owner %d:%d, mode %o", name, n.UID, n.GID, n.Mode)
		}
		st, err := os.Stat(filepath.Join(root, name))
		if err != nil || st.ModTime().Unix() != 0 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
		if _, ok := want[name]; !dir && !ok {
			t.Errorf("%s is too much", name)
		}
	}
	for name, content := range want {
		if got := read(t, filepath.Join(root, name)); content != "" && got != content {
			t.Errorf("%s: %d bytes, want %d", name, len(got), len(content))
		}
	}
}

// published are the variables that kata-agent knows; another one is an error
// (kata-containers: src/agent/src/main.rs, build_substitution_ctx).
var published = []string{
	"aa_attestation_uri", "aa_attestation_socket", "aa_config_path", "cdh_config_path", "cdh_socket",
	"ocicrypt_config_path", "rest_api_features", "launch_process_timeout", "initdata_toml_path",
	"extension_root", "attester_variant",
}

// agentManifest is what kata-agent parses, with every key that it knows
// (kata-containers: src/agent/src/guest_extension_image.rs).
type agentManifest struct {
	SchemaVersion *uint32           `toml:"schema_version"`
	Paths         map[string]string `toml:"paths"`
	Process       []struct {
		ID           *string                   `toml:"id"`
		Level        uint32                    `toml:"level"`
		Path         *string                   `toml:"path"`
		Select       *string                   `toml:"select"`
		Variants     map[string]map[string]any `toml:"variants"`
		Args         []string                  `toml:"args"`
		OptionalArgs []map[string]any          `toml:"optional_args"`
		Config       *string                   `toml:"config"`
		Env          map[string]string         `toml:"env"`
		WaitSocket   *string                   `toml:"wait_socket"`
		TimeoutSecs  *string                   `toml:"timeout_secs"`
	} `toml:"process"`
}

func TestTheAgentReadsTheManifest(t *testing.T) {
	for name, o := range map[string]Options{
		"plain":  {},
		"config": {Config: "version = 1\n"},
		"hub":    {CDH: "hub"},
		"both":   {Config: "version = 1\n", CDH: "hub"},
	} {
		t.Run(name, func(t *testing.T) {
			o.Kind, o.Arch = Extension, "amd64"
			files, _, err := ptr(sources(t, o)).extension()
			if err != nil {
				t.Fatal(err)
			}
			text := string(files[manifestPath].data)
			var m agentManifest
			if err := toml.NewDecoder(strings.NewReader(text)).DisallowUnknownFields().Decode(&m); err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			checkPaths(t, m, files)
			checkProcesses(t, m, files, o)
			for _, v := range regexp.MustCompile(`\$\{([^}]*)\}`).FindAllStringSubmatch(text, -1) {
				if v[1] != "…" && !slices.Contains(published, v[1]) { // the comment's
					t.Errorf("the agent does not know ${%s}", v[1])
				}
			}
		})
	}
}

func ptr[T any](v T) *T { return &v }

func checkPaths(t *testing.T, m agentManifest, files tree) {
	t.Helper()
	if m.SchemaVersion == nil || *m.SchemaVersion != 1 {
		t.Error("schema_version is not 1")
	}
	if _, ok := files[m.Paths["ocicrypt-config"]]; !ok {
		t.Errorf("ocicrypt-config is %q, which is not there", m.Paths["ocicrypt-config"])
	}
	bundle := m.Paths["pause-bundle"]
	var spec specs.Spec
	if err := json.Unmarshal(files[bundle+"/config.json"].data, &spec); err != nil {
		t.Fatal(err)
	}
	program, absolute := strings.CutPrefix(spec.Process.Args[0], "/")
	if f, ok := files[bundle+"/rootfs/"+program]; !absolute || !ok || f.mode != 0o755 {
		t.Errorf("the bundle has no program %s", spec.Process.Args[0])
	}
}

func checkProcesses(t *testing.T, m agentManifest, files tree, o Options) {
	t.Helper()
	var ids []string
	for _, p := range m.Process {
		ids = append(ids, *p.ID)
		if f, ok := files[*p.Path]; !ok || f.mode != 0o755 || !fs.ValidPath(*p.Path) {
			t.Errorf("%s is not there", *p.Path)
		}
		if p.WaitSocket == nil || p.TimeoutSecs == nil {
			t.Errorf("%s is not waited for", *p.ID)
		}
	}
	want := []string{"tatami-guest"}
	if o.CDH != "" {
		want = append(want, "confidential-data-hub")
	}
	if !slices.Equal(ids, want) {
		t.Errorf("started are %q, want %q", ids, want)
	}
	guest := m.Process[0]
	if guest.Level != 1 || *guest.WaitSocket != "${cdh_socket}" || *guest.Config != "${cdh_config_path}" {
		t.Errorf("tatami-guest: %+v", guest)
	}
	if named := slices.Contains(guest.Args, "${extension_root}/etc/tatami/guest.toml"); named != (o.Config != "") {
		t.Errorf("tatami-guest: %q", guest.Args)
	}
	if o.CDH != "" {
		hub := m.Process[1]
		// Both know the socket and the file by the same names.
		for _, name := range []string{*hub.WaitSocket, hub.Args[1]} {
			if hub.Level != 2 || !slices.Contains(guest.Args, name) || strings.Contains(name, "${") {
				t.Errorf("tatami-guest %q, hub %+v", guest.Args, hub)
			}
		}
	}
}

// TestAHubWithLibraries: the guest's own system has to have them.
func TestAHubWithLibraries(t *testing.T) {
	o := sources(t, Options{Kind: Extension, Arch: "amd64"})
	o.CDH = "/usr/bin/env" // dynamic on Debian
	r := make1(t, o)
	if len(r.Requires) < 2 || !strings.Contains(r.Requires[0], "ld-linux") || !slices.Contains(r.Requires, "libc.so.6") {
		t.Errorf("required are %q", r.Requires)
	}
}

// TestTatamiGuestKnowsItsArguments gives the real program what the agent would
// give it, with the agent's own values (kata-containers: src/agent/src/main.rs
// launch_process adds -c and the file, if it is there).
func TestTatamiGuestKnowsItsArguments(t *testing.T) {
	program := filepath.Join(t.TempDir(), "tatami-guest")
	t.Setenv("CGO_ENABLED", "0")
	tool(t, "go", "build", "-o", program, "../../guest/cmd/tatami-guest")
	root := t.TempDir()
	for name, text := range map[string]string{configPath: "version = 1\n", "cdh.toml": "[kbc]\nname = \"cc_kbc\"\n[tatami]\nversion = 1\n"} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	values := strings.NewReplacer("${cdh_socket}", agentCDHSocket, "${extension_root}", root, "${cdh_config_path}", root+"/cdh.toml")
	for _, o := range []Options{{}, {Config: "version = 1\n"}, {CDH: "hub"}, {Config: "version = 1\n", CDH: "hub"}} {
		p := o.guestProcess()
		var args []string
		for _, a := range append(p.Args, "-c", p.Config) {
			args = append(args, values.Replace(a))
		}
		tool(t, program, append(args, "check")...)
		if out, err := exec.CommandContext(t.Context(), program, append(args, "--no-such-flag")...).CombinedOutput(); err == nil {
			t.Errorf("check accepts anything: %s", out)
		}
	}
}
