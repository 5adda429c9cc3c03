// Package scale starts many sandboxes of one image at the same time on one node:
// a real tatami-host and a real tatami-guest for each, joined by unix sockets
// (`tatami run --vm=none`), over a registry that counts. The node has to ask the
// registry what it would ask for one sandbox, and has to send each what it reads.
// `make bench-scale` measures it with fifty.
package scale

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
	os.Exit(testbin.Main(m, &bin, []string{"./host/cmd/tatami-host", "./guest/cmd/tatami-guest"}, func() error {
		return os.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	}))
}

// missing says what this machine lacks; nothing when it is empty.
func missing() string {
	if os.Geteuid() != 0 {
		return "needs root: mounts file systems"
	}
	for _, p := range []string{"crun", "busybox"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Sprintf("needs %s: `make setup` installs it", p)
		}
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return fmt.Sprintf("needs FUSE: %v", err)
	}
	return ""
}
