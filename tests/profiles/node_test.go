package profiles

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/wireerr"
	"github.com/tatami-containers/tatami/tools/run"
)

// node is a tatami-host in a fresh directory.
type node struct {
	api.NodeService
	dir string
	cmd *exec.Cmd
	log bytes.Buffer
}

// startNode runs a node until the test ends.
func startNode(t *testing.T, settings string) *node {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "profiles") //nolint:usetesting // sockets are in it: the path must be short
	if err != nil {
		t.Fatal(err)
	}
	n := &node{dir: dir}
	file := filepath.Join(dir, "host.toml")
	if err := os.WriteFile(file, []byte("version = 1\n"+settings), 0o600); err != nil {
		t.Fatal(err)
	}
	n.cmd = exec.CommandContext(t.Context(), filepath.Join(bin, "tatami-host"), "--config", file,
		"--root", n.path("root"), "--socket", n.path("host.sock"), "--state", n.path("state"))
	n.cmd.Stdout, n.cmd.Stderr = &n.log, &n.log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.end(t) })
	var conn net.Conn
	await(t, "tatami-host listens", func() bool {
		c, err := new(net.Dialer).DialContext(t.Context(), "unix", n.path("host.sock"))
		conn = c
		return err == nil
	})
	client := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(wireerr.Client))
	t.Cleanup(func() { _ = client.Close() }) // the test is over
	n.NodeService = api.NewNodeClient(client)
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) end(t *testing.T) {
	t.Helper()
	_ = n.cmd.Process.Signal(syscall.SIGTERM) // the test's context may have ended it
	if err := n.cmd.Wait(); err != nil && t.Context().Err() == nil {
		t.Errorf("tatami-host: %v", err)
	}
	if t.Failed() {
		t.Logf("tatami-host:\n%s", &n.log)
	}
	if err := os.RemoveAll(n.dir); err != nil {
		t.Error(err)
	}
}

// prepare pulls the image and waits until what is known of its starts has been
// fetched.
func (n *node) prepare(t *testing.T, ref string) {
	t.Helper()
	if _, err := n.Prepare(t.Context(), &api.PrepareRequest{Reference: ref}); err != nil {
		t.Fatal(err)
	}
	await(t, "replays end", func() bool { return n.stats(t).Replays == 0 })
}

func (n *node) stats(t *testing.T) *api.NodeStatsResponse {
	t.Helper()
	s, err := n.NodeStats(t.Context(), &api.NodeStatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start runs a container and returns how many reads had to wait on the node.
func (n *node) start(t *testing.T, ref string) (misses int64) {
	t.Helper()
	before := n.stats(t).Store.Misses
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out, errs bytes.Buffer
	r, err := run.Run(ctx, run.Options{
		Image: ref, Args: command(), VM: run.None, Source: run.SourceRelay, Socket: n.path("host.sock"), Root: n.path("root"),
		Stdout: &out, Stderr: &errs,
	})
	if err != nil || r.ExitCode != 0 || strings.TrimSpace(out.String()) != fmt.Sprint(reads*size) {
		t.Fatalf("%+v, %v, stdout %q, stderr %q", r, err, &out, &errs)
	}
	return n.stats(t).Store.Misses - before
}

// tatami runs `tatami profile` and returns what it prints.
func (n *node) tatami(t *testing.T, word string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "tatami"),
		append([]string{"profile", word, "--socket", n.path("host.sock")}, args...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tatami profile %s %q: %v: %s", word, args, err, &errs)
	}
	return string(out)
}
