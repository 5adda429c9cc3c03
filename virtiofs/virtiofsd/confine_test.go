package virtiofsd

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestConfine confines a process of its own, built without cgo as the program is.
func TestConfine(t *testing.T) {
	const key = "TATAMI_TEST_CONFINE"
	if dir := os.Getenv(key); dir != "" {
		confineMyself(t, dir)
		return
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "image"), "image")
	cmd := exec.Command("go", "test", "-count=1", "-v", "-run=^TestConfine$", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", key+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestConfine") {
		t.Errorf("%v: %s", err, out)
	}
	t.Logf("%s", out)
}

func confineMyself(t *testing.T, path string) {
	dir, err := os.Open(path)
	must(t, err)
	version, err := confine(dir)
	must(t, err)
	t.Logf("Landlock version %d", version)
	if err := unix.Setuid(1); os.Getuid() == 0 && !errors.Is(err, unix.EPERM) {
		t.Errorf("change of the user: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(path, "image")); string(b) != "image" {
		t.Errorf("file below the directory: %q, %v", b, err)
	}
	if version == 0 {
		return // this kernel has none
	}
	for name, try := range map[string]func() error{
		"read outside":  func() error { _, err := os.ReadFile("/etc/passwd"); return err },
		"list outside":  func() error { _, err := os.ReadDir("/"); return err },
		"make a file":   func() error { return os.WriteFile(filepath.Join(path, "new"), nil, 0o644) },
		"write":         func() error { return os.WriteFile(filepath.Join(path, "image"), nil, 0o644) },
		"remove a file": func() error { return os.Remove(filepath.Join(path, "image")) },
		"run a program": func() error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	} {
		if err := try(); !errors.Is(err, unix.EACCES) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
