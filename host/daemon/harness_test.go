package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// patience bounds every wait; nothing here is to take so long.
const patience = 2 * time.Minute

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(play(role))
	}
	code := m.Run()
	for _, dir := range built {
		_ = os.RemoveAll(dir) // of the test itself
	}
	os.Exit(code)
}

var (
	buildMu sync.Mutex
	built   = map[session.Mode]string{} // directories of programs, by session; protected by buildMu
)

// program is tatami-host, built for this test: with Journal as on an old kernel,
// which also mounts by loop devices.
func program(t *testing.T, mode session.Mode) string {
	t.Helper()
	buildMu.Lock()
	defer buildMu.Unlock()
	if dir, ok := built[mode]; ok {
		return filepath.Join(dir, "tatami-host")
	}
	dir, err := os.MkdirTemp("", "tatami-host-") //nolint:usetesting // for all tests
	check(t, err)
	built[mode] = dir
	old := map[session.Mode]string{session.Journal: "yes"}[mode]
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "tatami-host"),
		"-ldflags", "-X github.com/tatami-containers/tatami/host/daemon.oldKernel="+old, "../cmd/tatami-host")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "tatami-host")
}

// bothModes runs a test with each way in which a session outlives a worker.
func bothModes(t *testing.T, f func(t *testing.T, mode session.Mode)) {
	needRoot(t)
	for _, mode := range []session.Mode{session.Direct, session.Journal} {
		t.Run(string(mode), func(t *testing.T) { f(t, mode) })
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE, EROFS and overlay")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("needs FUSE: %v", err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// host is a node with a registry, on which tatami-host runs.
type host struct {
	t    *testing.T
	dir  string // of everything, short
	run  string // the state directory
	view string // before a path of the node, to see it from here
	reg  *registrytest.Server

	program string
	cmd     *exec.Cmd // the supervisor, when it is our child
}

// newHost makes a node with settings, the text of snapshotters.
func newHost(t *testing.T, mode session.Mode, snapshotters string) *host {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "host") //nolint:usetesting // short: sockets are below
	check(t, err)
	h := &host{t: t, dir: dir, run: filepath.Join(dir, "state"), reg: registrytest.Start(t, registrytest.Options{}), program: program(t, mode)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("tatami-host:\n%s", h.log())
		}
		h.checkNothingLeft()
		check(t, os.RemoveAll(dir))
	})
	h.configure(snapshotters)
	return h
}

func (h *host) configure(snapshotters string) {
	h.t.Helper()
	text := fmt.Sprintf("version = 1\nroot = %q\nstate = %q\n[log]\nlevel = \"debug\"\nformat = \"text\"\n%s", h.root(), h.run, snapshotters)
	check(h.t, os.WriteFile(h.settings(), []byte(text), 0o600))
}

func (h *host) root() string     { return filepath.Join(h.dir, "root") }
func (h *host) settings() string { return filepath.Join(h.dir, "host.toml") }

func (h *host) log() string {
	b, _ := os.ReadFile(filepath.Join(h.dir, "log")) // none is an empty one
	return string(b[max(0, len(b)-20000):])
}

// start runs tatami-host without a service manager and waits until it serves.
func (h *host) start() {
	h.t.Helper()
	h.cmd = h.command()
	check(h.t, h.cmd.Start())
	cmd := h.cmd
	h.t.Cleanup(func() {
		if h.cmd == cmd {
			h.end(syscall.SIGTERM)
		}
	})
	h.awaitService()
}

func (h *host) command() *exec.Cmd {
	log, err := os.OpenFile(filepath.Join(h.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	check(h.t, err)
	h.t.Cleanup(func() { _ = log.Close() }) // the programs have their own
	cmd := exec.CommandContext(context.Background(), h.program, "--config", h.settings())
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// end ends the supervisor with a signal and waits for it.
func (h *host) end(sig syscall.Signal) {
	h.t.Helper()
	check(h.t, h.cmd.Process.Signal(sig))
	gone := make(chan error, 1)
	go func(cmd *exec.Cmd) { gone <- cmd.Wait() }(h.cmd)
	select {
	case err := <-gone:
		if sig == syscall.SIGTERM && err != nil {
			h.t.Errorf("tatami-host ended with %v", err)
		}
	case <-time.After(patience):
		h.t.Errorf("tatami-host does not end")
		_ = h.cmd.Process.Kill() // it was reported
	}
	h.cmd = nil
}

// awaitService waits until the worker answers.
func (h *host) awaitService() {
	h.t.Helper()
	eventually(h.t, "tatami-host serves", func() bool { return h.tryStatus() != nil })
}

// tryStatus asks on the control socket, nil when nobody answers.
func (h *host) tryStatus() *api.StatusResponse {
	c := h.control()
	if c == nil {
		return nil
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience/6)
	defer cancel()
	s, err := api.NewNodeClient(c).Status(ctx, &api.StatusRequest{})
	if err != nil {
		return nil
	}
	return s
}

func (h *host) control() *ttrpc.Client {
	c, err := dialUnix(h.view + filepath.Join(h.root(), "tatami-host.sock"))
	if err != nil {
		return nil
	}
	return ttrpc.NewClient(c)
}

func (h *host) status() *api.StatusResponse {
	h.t.Helper()
	var s *api.StatusResponse
	eventually(h.t, "status", func() bool { s = h.tryStatus(); return s != nil })
	return s
}

func (h *host) stats() *api.NodeStatsResponse {
	h.t.Helper()
	c := h.control()
	if c == nil {
		h.t.Fatal("no control socket")
	}
	defer c.Close()
	s, err := api.NewNodeClient(c).NodeStats(h.t.Context(), &api.NodeStatsRequest{})
	check(h.t, err)
	return s
}

// reads is how many reads of images the worker has answered.
func (h *host) reads() int64 { s := h.stats().Store; return s.Hits + s.Misses }

// tree lists all files of the node.
func (h *host) tree() (all []string) {
	h.t.Helper()
	err := filepath.WalkDir(h.root(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all = append(all, path)
		}
		return err
	})
	check(h.t, err)
	return all
}

// worker is the running child of a supervisor, 0 when there is none.
func worker(supervisor int) int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", supervisor))
	for _, l := range lists {
		b, _ := os.ReadFile(l) // the thread may end meanwhile
		for pid := range strings.FieldsSeq(string(b)) {
			if _, err := os.Readlink("/proc/" + pid + "/exe"); err == nil { // not a zombie
				n, _ := strconv.Atoi(pid) // the kernel wrote it
				return n
			}
		}
	}
	return 0
}

// awaitWorker waits for a worker other than the one before.
func (h *host) awaitWorker(before int) int {
	h.t.Helper()
	pid := 0
	eventually(h.t, "another worker", func() bool { pid = worker(h.cmd.Process.Pid); return pid != 0 && pid != before })
	return pid
}

// checkNothingLeft complains of what a tatami-host has left of the node.
func (h *host) checkNothingLeft() {
	h.t.Helper()
	left := slices.Concat(h.mounts(), h.processes(), h.sockets(), h.loops())
	if len(left) > 0 {
		h.t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}

func (h *host) mounts() (all []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	check(h.t, err)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, h.dir+"/") {
			all = append(all, strings.TrimSpace(line))
		}
	}
	return all
}

func (h *host) processes() (all []string) {
	lists, err := filepath.Glob("/proc/[0-9]*/cmdline")
	check(h.t, err)
	for _, l := range lists {
		if b, _ := os.ReadFile(l); strings.Contains(string(b), h.settings()) { // those that end meanwhile are none
			all = append(all, filepath.Dir(l)+" "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return all
}

func (h *host) sockets() (all []string) {
	err := filepath.WalkDir(h.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeSocket != 0 {
			all = append(all, path)
		}
		return err
	})
	check(h.t, err)
	return all
}

func (h *host) loops() (all []string) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	check(h.t, err)
	for _, f := range files {
		if b, _ := os.ReadFile(f); strings.Contains(string(b), h.dir+"/") { // one that is gone is none
			all = append(all, f)
		}
	}
	return all
}

// client is what containerd sees of a snapshotter, with calls that are made
// again when a worker dies under them.
type client struct {
	snapshots.Snapshotter
	t *testing.T
}

func (h *host) snapshotter(name string) *client {
	h.t.Helper()
	conn, err := grpc.NewClient("unix:"+h.view+filepath.Join(h.run, name+".sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.6, MaxDelay: 200 * time.Millisecond}}))
	check(h.t, err)
	h.t.Cleanup(func() { _ = conn.Close() }) // the test is over
	return &client{Snapshotter: proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), t: h.t}
}

// ctx is of a call.
func (s *client) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	s.t.Cleanup(cancel)
	return namespaces.WithNamespace(ctx, "k8s.io")
}

// again makes a call until a worker has answered it, and says whether it had to
// be made more than once.
func again(f func() error) (repeated bool, err error) {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if !errdefs.IsUnavailable(err) || time.Now().After(end) {
			return repeated, err
		}
		repeated = true
	}
}

// remove removes a snapshot.
func (s *client) remove(key string) {
	s.t.Helper()
	repeated, err := again(func() error { return s.Remove(s.ctx(), key) })
	if err != nil && (!repeated || !errdefs.IsNotFound(err)) {
		s.t.Errorf("remove %s: %v", key, err)
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	check(t, errors.Join(errs...))
}
