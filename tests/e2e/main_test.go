// Package e2e runs the programs as a user does: real containers, in real
// virtual machines, from images in a registry.
package e2e

import (
	"os"
	"os/exec"
	"testing"

	"github.com/tatami-containers/tatami/tests/testbin"
)

// bin is the directory of the programs under test.
var bin string

func TestMain(m *testing.M) {
	os.Exit(testbin.Main(m, &bin, []string{"./tools/cmd/tatami", "./host/cmd/tatami-host", "./guest/cmd/tatami-guest", "./virtiofs/cmd/tatami-virtiofsd", "./tests/treecmp/treedump"}))
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
	name   string
	vm     string
	source string // of the image
	needs  []string
}{
	{"vm", "qemu", "relay", []string{"qemu-system-x86_64", "crun", "busybox"}},
	{"process", "none", "relay", []string{"crun", "busybox"}},
	{"virtio-fs", "qemu", "virtiofs", []string{"qemu-system-x86_64", "crun", "busybox"}},
}
