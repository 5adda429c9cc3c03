package katavm

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// host is a running tatami-host that finds sandboxes by itself.
type host struct {
	api.NodeService
	client *ttrpc.Client
	pid    int    // of the supervisor
	dir    string // everything of the node, Kata's and containerd's directories, too
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
[classes.online]
fill = "none" # it is counted what is fetched
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
	h.pid = cmd.Process.Pid
	h.connect(t)
	t.Cleanup(func() { _ = h.client.Close() }) // the host may have ended
	return h
}

func (h *host) connect(t *testing.T) {
	t.Helper()
	waitFor(t, func() error {
		conn, err := net.Dial("unix", filepath.Join(h.root(), "tatami-host.sock"))
		if err != nil {
			return err
		}
		h.client = ttrpc.NewClient(conn)
		h.NodeService = api.NewNodeClient(h.client)
		return nil
	})
}

// workers lists the children of tatami-host (proc_pid_task(5), children).
func (h *host) workers(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", h.pid))
	if err != nil {
		t.Fatal(err)
	}
	var pids []string
	for _, f := range files {
		b, _ := os.ReadFile(f) // a thread may have ended
		pids = append(pids, strings.Fields(string(b))...)
	}
	return pids
}

// killWorker kills the one worker and waits for the next.
func (h *host) killWorker(t *testing.T) {
	t.Helper()
	before := h.workers(t)
	if len(before) != 1 {
		t.Fatalf("workers of tatami-host: %v", before)
	}
	pid, err := strconv.Atoi(before[0])
	if err == nil {
		err = syscall.Kill(pid, syscall.SIGKILL)
	}
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() error {
		if now := h.workers(t); len(now) != 1 || now[0] == before[0] {
			return fmt.Errorf("workers of tatami-host: %v, %v before", now, before)
		}
		return nil
	})
	_ = h.client.Close() // the worker at its other end is dead
	h.connect(t)
}

// stats counts since the worker was started.
func (h *host) stats(t *testing.T) *api.NodeStatsResponse {
	t.Helper()
	stats, err := h.NodeStats(t.Context(), &api.NodeStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return stats
}
