package run

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// A process that a tatami-virtiofsd leaves behind, with its standard error, does not
// hold up the end of a run.
func TestShareLeavesAProcess(t *testing.T) {
	dir := t.TempDir()
	bin, pid := filepath.Join(dir, "program"), filepath.Join(dir, "pid")
	script := "#!/bin/sh\nsleep 600 &\necho $! > " + pid + "\necho '" + shareReady + "' >&2\nexec sleep 600 2>/dev/null\n"
	if err := os.WriteFile(bin, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := startShare(t.Context(), bin, dir, "images", "box")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.close(ctx); err != nil { // or hangs
		t.Error(err)
	}
	b, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	left, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(left, syscall.SIGKILL); err != nil {
		t.Errorf("nothing was left: %v", err)
	}
}
