package guestimage

import (
	"os"
	"path/filepath"
	"testing"
)

// TestTarball unpacks as osbuilder does and lets systemd read the unit.
func TestTarball(t *testing.T) {
	o := sources(t, Options{Kind: Tarball, Arch: "amd64", Config: "version = 1\n"})
	r := make1(t, o)
	root := t.TempDir()
	tool(t, "tar", "--zstd", "-xf", r.File, "-C", root)
	tool(t, "systemd-analyze", "verify", "--root="+root, "--recursive-errors=no", "--man=no", "tatami-guest.service")
	want, err := os.Readlink(filepath.Join(root, wantPath))
	if err != nil || read(t, filepath.Join(root, want)) != unit {
		t.Errorf("the target wants %s, %v", want, err)
	}
	for name, from := range map[string]string{guestPath: o.Guest, configPath: o.Config, pauseBundle + "/rootfs/pause": o.Pause} {
		if read(t, filepath.Join(root, name)) != read(t, from) {
			t.Errorf("%s is another file", name)
		}
	}
	if st, err := os.Stat(filepath.Join(root, guestPath)); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st, err)
	}
}
