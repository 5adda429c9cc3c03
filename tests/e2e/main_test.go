// Package e2e runs the programs as a user does: real containers, in real
// virtual machines, from images in a registry.
package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// bin is the directory of the programs under test.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			return m.Run() // every test skips and says why
		}
		dir, err := os.MkdirTemp("", "tatami-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		if err := build(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func build(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator),
		"./tools/cmd/tatami", "./host/cmd/tatami-host", "./guest/cmd/tatami-guest", "./tests/treecmp/treedump")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}

// need skips a test where it cannot run and says what is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems and starts virtual machines")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: `make setup` installs it", p)
		}
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("needs FUSE: %v", err)
	}
}

// places are the ways to run that most tests go through.
var places = []struct {
	name  string
	vm    string
	needs []string
}{
	{"vm", "qemu", []string{"qemu-system-x86_64", "crun", "busybox"}},
	{"process", "none", []string{"crun", "busybox"}},
}
