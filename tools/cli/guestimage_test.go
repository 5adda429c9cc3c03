package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tools/guestimage"
)

// program builds a static program of ours for this machine.
func program(t *testing.T, pkg string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "program")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", file, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return file
}

// TestGuestImage builds an extension out of real static programs.
func TestGuestImage(t *testing.T) {
	guest, pause := program(t, "../../guest/cmd/tatami-guest"), program(t, "../../guest/cmd/pause")
	config, file := filepath.Join(t.TempDir(), "guest.toml"), filepath.Join(t.TempDir(), "image")
	args := []string{"guest-image", "build", "--guest", guest, "--pause", pause, "--config", config, "--verity", "--salt", "00ff"}
	if err := os.WriteFile(config, []byte("version = 1\nstore_sise = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := guestImage(t, append(args, file)...); code != exitFailed || !strings.Contains(errs, `unknown key "store_sise"`) {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	if err := os.WriteFile(config, []byte("version = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs := guestImage(t, append(args, file)...)
	for _, want := range []string{file, "extension for " + runtime.GOARCH, "sha256:", `verity_params = "root_hash=`, ",salt=00ff,"} {
		if code != 0 || errs != "" || !strings.Contains(out, want) {
			t.Fatalf("exit code %d, %q is missing in\n%s%s", code, want, out, errs)
		}
	}
	var r guestimage.Result
	_, out, _ = guestImage(t, append(args, "-o", "json", file)...)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(file)
	if err != nil || r.Size != st.Size() || r.File != file || r.Kind != guestimage.Extension || r.Digest.Validate() != nil {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestGuestImageRefused(t *testing.T) {
	for want, args := range map[string][]string{
		"usage: tatami guest-image build": {"guest-image"},
		"name one file, after the flags":  {"guest-image", "build"},
		"want text or json":               {"guest-image", "build", "-o", "yaml", "x"},
		"salt":                            {"guest-image", "build", "--salt", "xyz", "x"},
		"want extension":                  {"guest-image", "build", "--guest", "x", "--pause", "x", "--kind", "iso", "x"},
		"is neither beside tatami":        {"guest-image", "build", "--guest", "x", "x"},
	} {
		if want == "is neither beside tatami" {
			t.Setenv("PATH", t.TempDir())
		}
		if code, _, errs := guestImage(t, args...); code != exitFailed || !strings.Contains(errs, want) {
			t.Errorf("%q: exit code %d, %q", args, code, errs)
		}
	}
}

func guestImage(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = Main(t.Context(), args, Streams{In: strings.NewReader(""), Out: &o, Err: &e})
	return code, o.String(), e.String()
}
