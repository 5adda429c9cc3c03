package extension

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// mounted is an extension with the given manifest.
func mounted(t *testing.T, manifest string) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, manifestPath)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// whole uses all that a manifest may have, and keys that no agent knows.
const whole = `
schema_version = 1
future = "passed over"
[paths]
"ocicrypt-config" = "etc/ocicrypt_config.json"
"pause-bundle" = "/pause_bundle"
[[process]]
id = "one"
level = 1
path = "usr/bin/one"
args = ["--socket", "${socket}"]
optional_args = [{when = "empty", args = ["--no"]}, {when = "socket", args = ["--yes=${socket}"]}]
config = "${config}"
env = {B = "${root}/b", A = "a"}
wait_socket = "${socket}"
timeout_secs = "${timeout}"
[[process]]
id = "two"
level = 2
select = "${variant}"
env = {A = "base"}
[process.variants.default]
path = "usr/bin/two"
args = ["--variant"]
env = {A = "variant"}
[[process]]
id = "never"
path = "usr/bin/never"
`

var vars = map[string]string{"socket": "/run/s", "empty": "", "config": "/run/c", "root": "/x", "timeout": "6", "variant": ""}

func TestPlan(t *testing.T) {
	dir := mounted(t, whole)
	e, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := e.Plan(3, vars)
	if err != nil || len(plan) != 2 {
		t.Fatalf("plan %v, %v", plan, err)
	}
	one := plan[0]
	if one.Path != filepath.Join(dir, "usr/bin/one") || one.Config != "/run/c" || one.WaitSocket != "/run/s" || one.Timeout != 6*time.Second ||
		!slices.Equal(one.Args, []string{"--socket", "/run/s", "--yes=/run/s"}) || !slices.Equal(one.Env, []string{"A=a", "B=/x/b"}) {
		t.Errorf("first process %+v", one)
	}
	two := plan[1]
	if two.Path != filepath.Join(dir, "usr/bin/two") || !slices.Equal(two.Args, []string{"--variant"}) || !slices.Equal(two.Env, []string{"A=variant"}) || two.Timeout != 0 {
		t.Errorf("second process %+v", two)
	}
	if plan, err := e.Plan(1, vars); err != nil || len(plan) != 1 {
		t.Errorf("at level 1: %v, %v", plan, err)
	}
	if path, err := e.Component(PauseBundle); err != nil || path != filepath.Join(dir, "pause_bundle") {
		t.Errorf("pause bundle %q, %v", path, err)
	}
}

func TestNoExtension(t *testing.T) {
	if e, err := Open(filepath.Join(t.TempDir(), "coco")); e != nil || err != nil {
		t.Errorf("%v, %v", e, err)
	}
}

func TestRefused(t *testing.T) {
	const head = "schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\n"
	for _, c := range []struct{ name, manifest string }{
		{"no version", strings.TrimPrefix(whole, "\nschema_version = 1")},
		{"another version", "schema_version = 2"},
		{"version of another type", `schema_version = "1"`},
		{"no TOML", "schema_version = "},
		{"no id", "schema_version = 1\n[[process]]\nlevel = 1\npath = \"a\""},
		{"key in upper case", "schema_version = 1\n[[process]]\nid = \"a\"\nPath = \"a\""},
		{"number for a timeout", head + "path = \"a\"\ntimeout_secs = 6"},
		{"timeout that is no number", head + "path = \"a\"\ntimeout_secs = \"soon\""},
		{"unknown variable", head + "path = \"a\"\nargs = [\"${nothing}\"]"},
		{"open variable", head + "path = \"a\"\nargs = [\"${socket\"]"},
		{"no path", head},
		{"path outside", head + "path = \"../a\""},
		{"unknown variant", head + "path = \"a\"\nselect = \"${socket}\"\n[process.variants.default]\n"},
		{"path of a component outside", head + "path = \"a\"\n[paths]\n\"pause-bundle\" = \"a/../../b\""},
		{"no pause bundle", head + "path = \"a\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, err := Open(mounted(t, c.manifest))
			if err == nil {
				_, err = e.Plan(3, vars)
			}
			if err == nil {
				_, err = e.Component(PauseBundle)
			}
			if err == nil {
				t.Error("accepted")
			}
		})
	}
	if _, err := Open(t.TempDir()); err == nil {
		t.Error("a mounted extension without a manifest is accepted")
	}
}
