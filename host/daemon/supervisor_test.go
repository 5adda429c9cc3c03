package daemon

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/host/config"
)

// A second tatami-host finds the sockets taken before it cleans up: what it would
// unmount is the first one's.
func TestSecondCleansNothing(t *testing.T) {
	dir := t.TempDir()
	cfg := config.Config{State: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "s")}
	l, err := net.Listen("unix", cfg.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mountPoint := filepath.Join(cfg.State, "lower", "image")
	if err := os.MkdirAll(mountPoint, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := supervise(t.Context(), cfg, nil, slog.New(slog.DiscardHandler)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second one started: %v", err)
	}
	if _, err := os.Stat(mountPoint); err != nil {
		t.Error(err)
	}
}
