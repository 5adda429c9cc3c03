// Package containerd tests the snapshotter with the programs that users have:
// containerd 2 and Debian's 1.6, ctr, crictl, runc, docker-registry. Each test
// has a node of its own: see node.
package containerd

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/testbin"
)

// patience bounds one command and one wait.
const patience = time.Minute

// bin is the directory of the programs under test.
var bin string

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(initEnv) != "":
		os.Exit(nodeInit())
	case os.Getenv(keeperEnv) != "":
		os.Exit(nodeKeeper())
	}
	os.Exit(testbin.Main(m, &bin, []string{"./tools/cmd/tatami", "./host/cmd/..."}, buildTheirs))
}

// need skips a test where it cannot run and says what is missing.
func need(t testing.TB, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: runs containers")
	}
	for _, p := range append(programs, "nsenter", "runc", "docker-registry", "busybox") {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: `make setup` installs it", p)
		}
	}
}
