// Package containerd tests the snapshotter with the programs that users have:
// containerd 2 and Debian's 1.6, ctr, crictl, runc, docker-registry. Each test
// has a node of its own: see node.
package containerd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
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
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			return m.Run() // every test skips and says why
		}
		dir, err := os.MkdirTemp("", "tatami-containerd-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		for _, build := range []func() error{buildOurs, buildTheirs} {
			if err := build(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		return m.Run()
	}())
}

// buildTime bounds the build of all programs without a build cache.
const buildTime = 15 * time.Minute

func buildOurs() error {
	ctx, cancel := context.WithTimeout(context.Background(), buildTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-o", bin+string(filepath.Separator),
		"./tools/cmd/tatami", "./host/cmd/...")
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
		t.Skip("needs root: runs containers")
	}
	for _, p := range append(programs, "nsenter", "runc", "docker-registry", "busybox") {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: `make setup` installs it", p)
		}
	}
}
