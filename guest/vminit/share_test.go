package vminit

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sysfs lists devices of some kinds as /sys/bus/virtio/devices does.
func sysfs(t *testing.T, kinds ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i, kind := range kinds {
		dev := filepath.Join(dir, "virtio"+string(rune('0'+i)))
		if err := os.Mkdir(dev, 0o755); err != nil {
			t.Fatal(err)
		}
		if kind == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dev, "device"), []byte(kind+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestHasDevice(t *testing.T) {
	for name, tc := range map[string]struct {
		kinds []string
		want  bool
	}{
		"none": {nil, false}, "others": {[]string{"0x0001", "", "0x0013"}, false}, "one": {[]string{"0x0013", "0x001a"}, true},
	} {
		if got := hasDevice(sysfs(t, tc.kinds...), virtioFS); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if hasDevice("/none/at/all", virtioFS) {
		t.Error("a device without sysfs")
	}
}

func TestShareIsOptional(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	var said strings.Builder
	log := slog.New(slog.NewTextHandler(&said, nil))
	if err := mountShare("", virtioDevices, log); err != nil {
		t.Error(err)
	}
	if err := mountShare(dir, sysfs(t, "0x0013"), log); err != nil || said.Len() > 0 {
		t.Errorf("without a device: %v, %s", err, &said)
	}
	// A device with another tag, or a kernel without virtio-fs.
	if err := mountShare(dir, sysfs(t, virtioFS), log); err != nil || !strings.Contains(said.String(), "not mounted") {
		t.Errorf("with a device: %v, %s", err, &said)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the mount point is left")
	}
}
