package katavm

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// host is a running tatami-host that finds sandboxes by itself.
type host struct {
	api.NodeService
	dir string // everything of the node, Kata's and containerd's directories, too
}

// Directories of a node, below that of the test.
func (h *host) root() string       { return filepath.Join(h.dir, "tatami") }
func (h *host) state() string      { return filepath.Join(h.dir, "state") }
func (h *host) kata() string       { return filepath.Join(h.dir, "kata") }
func (h *host) containerd() string { return filepath.Join(h.dir, "containerd") }

const hostConfig = `
version = 1
root = %q
state = %q
[kata]
discover = true
run_dirs = [%q]
containerd_state = %q
[[snapshotter]]
name = %q
mode = "guest"
[[snapshotter]]
name = %q
mode = "block"
upper_size = %q
[[snapshotter]]
name = %q
mode = "block"
upper_size = "0"
`

// startHost runs a tatami-host until the test ends and connects to it.
func startHost(t *testing.T) *host {
	t.Helper()
	h := &host{dir: tempDir(t)}
	file := filepath.Join(h.dir, "host.toml")
	config := fmt.Sprintf(hostConfig, h.root(), h.state(), h.kata(), h.containerd(), guestMode, diskMode, upperSize, memoryMode)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(h.dir, "tatami-host.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "tatami-host"), "--config", file)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Wait(); err != nil && t.Context().Err() == nil {
			t.Errorf("tatami-host: %v", err)
		}
		if t.Failed() {
			b, _ := os.ReadFile(log.Name()) // for people
			t.Logf("tatami-host:\n%s", b)
		}
	})
	h.connect(t)
	return h
}

func (h *host) connect(t *testing.T) {
	t.Helper()
	waitFor(t, func() error {
		conn, err := net.Dial("unix", filepath.Join(h.root(), "tatami-host.sock"))
		if err != nil {
			return err
		}
		client := ttrpc.NewClient(conn)
		t.Cleanup(func() { _ = client.Close() }) // the host may have ended
		h.NodeService = api.NewNodeClient(client)
		return nil
	})
}

// relayed is how many bytes sandboxes have got.
func (h *host) relayed(t *testing.T) int64 {
	t.Helper()
	stats, err := h.NodeStats(t.Context(), &api.NodeStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return stats.RelayBytes
}
