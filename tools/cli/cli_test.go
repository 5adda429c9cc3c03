package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		out  string // in standard output
		err  string // in standard error
	}{
		{nil, 0, "tatami run", ""},
		{[]string{"help"}, 0, "tatami mount", ""},
		{[]string{"version"}, 0, "tatami ", ""},
		{[]string{"fly"}, exitFailed, "", `unknown command "fly"`},
		{[]string{"run"}, exitFailed, "", "no image named"},
		{[]string{"run", "-h"}, 0, "", "-mount-path"},
		{[]string{"run", "--nonsense"}, exitFailed, "", "nonsense"},
		{[]string{"run", "--format", "xml", "x"}, exitFailed, "", `"xml"`},
		{[]string{"run", "--vm", "moon", "x"}, exitFailed, "", "moon"},
		{[]string{"run", "--mode", "full", "debian"}, exitFailed, "", "HOST:PORT"},
		{[]string{"mount", "x"}, exitFailed, "", "IMAGE DIR"},
		{[]string{"help"}, 0, "tatami check node", ""},
		{[]string{"check"}, exitFailed, "", "name one image"},
		{[]string{"check", "--image", "a", "b"}, exitFailed, "", "name one image"},
		{[]string{"check", "-h"}, 0, "", "tatami check node"},
		{[]string{"check", "-o", "json", "node"}, exitFailed, "", "--image node"},
		{[]string{"check", "--image", "oci:/no/such/dir"}, exitFailed, "", "/no/such/dir"},
		{[]string{"check", "node", "-h"}, 0, "", "Writes nothing"},
		{[]string{"check", "node", "x"}, exitFailed, "", `["x"]`},
		{[]string{"check", "node", "-o", "xml"}, exitFailed, "", `"xml"`},
		{[]string{"check", "node", "--root", "/no/such/dir"}, exitFailed, "", "/no/such/dir"},
		{[]string{"check", "node", "--root", t.TempDir()}, exitProblems, "/etc/containerd/config.toml", ""},
		{[]string{"status", "--socket", "/no/such.sock"}, exitFailed, "", "is it running?"},
		{[]string{"status", "x"}, exitFailed, "", `["x"]`},
		{[]string{"status", "-o", "xml"}, exitFailed, "", `"xml"`},
		{[]string{"profile", "-h"}, 0, "", "ready CONTAINER"},
		{[]string{"profile"}, exitFailed, "", "tatami profile -h"},
		{[]string{"profile", "fly"}, exitFailed, "", `"fly"`},
		{[]string{"profile", "export"}, exitFailed, "", `"export" with 0 arguments`},
		{[]string{"profile", "import", "a", "b", "c"}, exitFailed, "", `"import" with 3 arguments`},
		{[]string{"profile", "ls", "--socket", "/no/such.sock"}, exitFailed, "", "is it running?"},
		{[]string{"bench"}, exitFailed, "", "bench start"},
		{[]string{"bench", "start", "--link", "fast", "x"}, exitFailed, "", "fast"},
		{[]string{"bench", "start", "debian"}, exitFailed, "", "HOST:PORT"},
	} {
		var out, errs bytes.Buffer
		code := Main(t.Context(), c.args, Streams{In: strings.NewReader(""), Out: &out, Err: &errs})
		if code != c.code || !strings.Contains(out.String(), c.out) || !strings.Contains(errs.String(), c.err) {
			t.Errorf("%q: exit code %d\n%s%s", c.args, code, out.String(), errs.String())
		}
	}
}

// A node where runc uses the mode share, from containerd 1.6 on: exit code 0, and
// a report that programs can read.
func TestCheckNode(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"etc/containerd/config.toml": `version = 2
[proxy_plugins.tatami-share]
type = "snapshot"
address = "/run/tatami-host/tatami-share.sock"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "tatami-share"
disable_snapshot_annotations = false
`,
		"etc/tatami/host.toml": "version = 1\n[[snapshotter]]\nname = \"tatami-share\"\nmode = \"share\"\n",
	} {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var out, errs bytes.Buffer
	args := []string{"check", "node", "--root", root, "--containerd-version", "1.6.20", "-o", "json"}
	if code := Main(t.Context(), args, Streams{Out: &out, Err: &errs}); code != 0 || errs.Len() > 0 {
		t.Fatalf("exit code %d\n%s%s", code, out.String(), errs.String())
	}
	var r struct {
		Works    bool
		Handlers []struct{ Name, Mode string }
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil || !r.Works || len(r.Handlers) != 1 || r.Handlers[0].Name != "runc" || r.Handlers[0].Mode != "share" {
		t.Errorf("%v, %s", err, out.String())
	}
}
