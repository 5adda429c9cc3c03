// Package profiles starts containers of one image on nodes that know nothing, and on
// nodes that know what the first start read: a real tatami-host for each node, a
// tatami-guest for each sandbox (`tatami run --vm=none`), the command line of tatami,
// and Debian's docker-registry.
package profiles

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/tatami-containers/tatami/tests/testbin"
)

// bin is the directory of the programs under test.
var bin string

func TestMain(m *testing.M) {
	programs := []string{"./host/cmd/tatami-host", "./guest/cmd/tatami-guest", "./tools/cmd/tatami"}
	os.Exit(testbin.Main(m, &bin, programs, func() error {
		return os.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	}))
}

// missing says what this machine lacks; nothing when it is empty.
func missing() string {
	if os.Geteuid() != 0 {
		return "needs root: mounts file systems"
	}
	for _, p := range []string{"crun", "busybox", "docker-registry"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Sprintf("needs %s: `make setup` installs it", p)
		}
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return fmt.Sprintf("needs FUSE: %v", err)
	}
	return ""
}
