// Package testbin builds programs of this module for tests that start them, once
// in a test process.
package testbin

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// buildTime bounds a build without a cache.
const buildTime = 15 * time.Minute

// Main runs the tests of a package two levels below the module's root with
// programs in a directory, which it sets bin to; packages are relative to the
// root. more is called when they are built. It returns the exit code.
func Main(m *testing.M, bin *string, packages []string, more ...func() error) int {
	if os.Geteuid() != 0 {
		return m.Run() // every test skips and says why
	}
	dir, err := os.MkdirTemp("", "tatami-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	*bin = dir
	err = build(dir, packages)
	for _, f := range more {
		if err == nil {
			err = f()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func build(dir string, packages []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), buildTime)
	defer cancel()
	args := append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", dir + string(filepath.Separator)}, packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}
