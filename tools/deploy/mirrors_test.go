package deploy

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/registry/hosts"
)

// examples returns the indented texts of a file for users by the path that their
// first line names.
func examples(t *testing.T, name string) map[string]string {
	t.Helper()
	out := map[string]string{}
	path := ""
	for line := range strings.Lines(string(read(t, name))) {
		text, indented := strings.CutPrefix(line, "    ")
		if first, ok := strings.CutPrefix(text, "# "); ok && indented && strings.Contains(first, "/") {
			path, _, _ = strings.Cut(strings.TrimSpace(first), ",")
		} else if path != "" && (indented || strings.TrimSpace(line) == "") {
			out[path] += text
		} else if !indented {
			path = ""
		}
	}
	return out
}

// TestMirrors reads the hosts.toml files of mirrors.md as tatami-host does.
func TestMirrors(t *testing.T) {
	found := 0
	for path, text := range examples(t, "mirrors.md") {
		name, ok := strings.CutPrefix(path, "/etc/containerd/certs.d/")
		if !ok {
			continue
		}
		found++
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o700); err != nil {
			t.Fatal(err)
		}
		text = strings.ReplaceAll(text, `ca = "mirror-ca.pem"`, "") // a file of the user's
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		tree := hosts.New([]string{dir}, hosts.Options{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))})
		list := tree.Hosts(filepath.Dir(name))
		if len(list) != 2 || list[0].Capabilities != registry.CanPull|registry.CanResolve || log.Len() != 0 {
			t.Errorf("%s: %d hosts\n%s", path, len(list), &log)
		}
	}
	if found != 2 {
		t.Errorf("%d files hosts.toml, want 2", found)
	}
}
