package volume

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// The record as both runtimes decode it: standard base64 with padding; all four
// names for runtime-rs (no field of NydusExtraOptions has a default), the first
// three not empty for the Go runtime (parseExtraOption).
func TestExtra(t *testing.T) {
	const want = `{"source":"/run/t/trees/ab","config":"{}","snapshotdir":"/var/lib/t/7/vm","fs_version":"v6"}`
	o, err := Extra{Source: "/run/t/trees/ab", Config: "{}", SnapshotDir: "/var/lib/t/7/vm", FSVersion: FSVersion}.Option()
	if err != nil {
		t.Fatal(err)
	}
	encoded, ok := strings.CutPrefix(o, "extraoption=")
	if text, err := base64.StdEncoding.Strict().DecodeString(encoded); !ok || err != nil || string(text) != want {
		t.Errorf("%s: %s, %v; want %s", o, text, err, want)
	}
}

func TestExtraRefused(t *testing.T) {
	good := Extra{Source: "s", Config: "c", SnapshotDir: "/d", FSVersion: "v5"}
	if _, err := good.Option(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Extra){
		"no source": func(e *Extra) { e.Source = "" }, "no config": func(e *Extra) { e.Config = "" },
		"no directory": func(e *Extra) { e.SnapshotDir = "" }, "relative": func(e *Extra) { e.SnapshotDir = "d" },
		"version": func(e *Extra) { e.FSVersion = "v7" }, "no text": func(e *Extra) { e.Source = "\xff" },
		"zero byte": func(e *Extra) { e.Config = "\x00" },
	} {
		bad := good
		change(&bad)
		if o, err := bad.Option(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %q, %v", name, o, err)
		}
	}
}
