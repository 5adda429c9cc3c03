package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// modules are the programs that no Debian 12 package has, or not this young.
// All of them build without C; the version is part of the cache's path.
var modules = []struct{ path, version, commands string }{
	{"github.com/containerd/containerd/v2", "v2.4.2", "containerd ctr containerd-shim-runc-v2"},
	{"sigs.k8s.io/cri-tools", "v1.37.0", "crictl"},
}

// release is a containerd to test with.
type release struct {
	name     string
	major    int
	programs string // directory of containerd, ctr and the shim
	crictl   string // path; speaks CRI v1, as both releases do
}

// releases are set by buildTheirs.
var releases []release

// buildTheirs builds the modules' programs once per version, into the user's
// cache directory.
func buildTheirs() error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	var dirs []string
	for _, m := range modules {
		dir := filepath.Join(cache, "tatami", "programs", strings.ReplaceAll(m.path, "/", "_")+"@"+m.version)
		if err := install(dir, m.path, m.version, strings.Fields(m.commands)); err != nil {
			return fmt.Errorf("build %s: %w", m.path, err)
		}
		dirs = append(dirs, dir)
	}
	crictl := filepath.Join(dirs[1], "crictl")
	releases = []release{{"2.4", 2, dirs[0], crictl}, {"1.6", 1, "/usr/bin", crictl}}
	return nil
}

// buildTime bounds the build of one module's programs without a build cache.
const buildTime = 15 * time.Minute

// install builds commands of a module into dir, unless they are there. Another
// test process that does the same is waited for.
func install(dir, module, version string, commands []string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// A directory beside it: the build is there whole or not at all.
	half := dir + ".new"
	if err := os.RemoveAll(half); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildTime)
	defer cancel()
	args := []string{"install", "-trimpath", "-ldflags=-s -w"}
	for _, c := range commands {
		args = append(args, module+"/cmd/"+c+"@"+version)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "GOBIN="+half, "CGO_ENABLED=0", "GOFLAGS=")
	cmd.Dir = os.TempDir() // outside of this module
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	return os.Rename(half, dir)
}
