// Package katavm goes the whole way of a container start with Kata in a real
// virtual machine: the extension image as a disk, kata-agent's mount order and
// manifest, PullImage, a process in the root file system, its removal. Kata
// itself needs KVM; stand-ins for its shim and its agent do what the real ones
// do (packages shim and agent say from which files that is taken).
package katavm

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/testbin"
	"github.com/tatami-containers/tatami/tests/vmtest"
)

// bin is the directory of the programs under test.
var bin string

// patience bounds one command and one wait.
const patience = 3 * time.Minute

func TestMain(m *testing.M) {
	os.Exit(testbin.Main(m, &bin, []string{
		"./tools/cmd/tatami", "./host/cmd/tatami-host", "./guest/cmd/tatami-guest", "./guest/cmd/pause", "./tests/treecmp/treedump",
	}))
}

// need skips a test where it cannot run and says what is missing.
func need(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems and starts virtual machines")
	}
	for _, p := range []string{"docker-registry", "crun", "busybox", "mkfs.ext4", "tar"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: `make setup` installs it", p)
		}
	}
	vmtest.Need(t)
}

// run runs a program to its end and returns its standard output; the test fails
// with its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd, err, &out, &errs)
	}
	return out.String()
}

// extensionImage builds the guest extension image as a user does. verity is the
// verity_params of the configuration: "" for a raw image.
func extensionImage(t *testing.T, flags ...string) (file, verity string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "extension.img")
	args := append([]string{"guest-image", "build", "--kind", "extension", "-o", "json"}, flags...)
	var built struct {
		VerityParams string `json:"verity_params"`
	}
	if err := json.Unmarshal([]byte(run(t, filepath.Join(bin, "tatami"), append(args, file)...)), &built); err != nil {
		t.Fatal(err)
	}
	return file, built.VerityParams
}

// tempDir is a directory whose path is short enough for sockets below it.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kata-") //nolint:usetesting // sockets are below it: the path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
