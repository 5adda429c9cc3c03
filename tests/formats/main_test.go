// Package formats holds every image format to one standard: an image made by
// the format's own programs, pushed to a real registry, prepared by tatami-host
// and mounted by tatami-guest shows the tree that an independent unpack of the
// same layers shows.
package formats

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/testbin"
)

// bin is the directory of the programs under test.
var bin string

// patience bounds one command.
const patience = 5 * time.Minute

func TestMain(m *testing.M) {
	os.Exit(testbin.Main(m, &bin, []string{"./tools/cmd/tatami", "./host/cmd/tatami-host", "./guest/cmd/tatami-guest", "./tests/treecmp/treedump"}))
}

// need skips a test where it cannot run and says what is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: `make setup` installs it", p)
		}
	}
}

// run runs a program to its end; the test fails with its output.
func run(t *testing.T, env []string, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, out)
	}
}
