package containerd

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// node is a machine of its own for one test, but for the network: daemons, shims
// and containers are in its PID and mount namespaces and see an empty /run, so
// that the programs' own paths can be used and nothing outlives the test.
type node struct {
	dir    string // on disk; the same path inside and outside
	pid    int    // of its process 1
	cgroup string // all control groups of the node are below this one

	rel     release
	manager *manager // of tatami-host; nil before its first start
}

// newNode starts a node without any daemon.
func newNode(t *testing.T, rel release) *node {
	t.Helper()
	need(t)
	if _, err := os.Stat(filepath.Join(rel.programs, "containerd")); err != nil {
		t.Skip("needs containerd of Debian: `make setup` installs it")
	}
	n := &node{dir: t.TempDir(), rel: rel}
	n.cgroup = "tatami-" + filepath.Base(filepath.Dir(n.dir)) + "-" + filepath.Base(n.dir) // names the test
	n.pid = startInit(t, n.cgroup)
	t.Cleanup(func() { n.report(t) })
	return n
}

// report shows the ends of the daemons' logs when the test has failed.
func (n *node) report(t *testing.T) {
	if !t.Failed() {
		return
	}
	logs, _ := filepath.Glob(filepath.Join(n.dir, "*.log")) // the pattern is right
	for _, path := range logs {
		log, _ := os.ReadFile(path) // it was there just now
		log = startup.ReplaceAll(log, nil)
		t.Logf("%s: %s", filepath.Base(path), log[max(0, len(log)-8000):])
	}
}

// startup matches what containerd logs about each of its plugins.
var startup = regexp.MustCompile(`(?m)^.*msg="(loading|skip loading) .*\n`)

// command prepares a program to be run in the node.
func (n *node) command(ctx context.Context, args ...string) *exec.Cmd {
	args = inNode(n.pid, args...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "PATH="+n.rel.programs+":"+bin+":"+os.Getenv("PATH"), "XDG_RUNTIME_DIR=/run")
	cmd.WaitDelay = time.Second // children may hold its output
	return cmd
}

// try runs a program in the node and returns what it wrote to standard output.
func (n *node) try(t *testing.T, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := n.command(ctx, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out), nil
}

// run is try for what must work.
func (n *node) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.try(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// daemon is a program that runs in a node until it, or the node, is ended.
type daemon struct {
	n     *node
	name  string
	ended chan struct{} // closed
}

// start starts a daemon whose log is <dir>/<name>.log; it is appended to. The
// files become its descriptors from 3 on, as sd_listen_fds(3) has it.
func (n *node) start(t *testing.T, name string, env []string, files []*os.File, args ...string) *daemon {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(n.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d := &daemon{n, name, make(chan struct{})}
	cmd := n.command(context.Background(), append([]string{"sh", "-c", `echo $$ >"$0" && export LISTEN_PID=$$ && exec "$@"`, d.pidFile()}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env, cmd.ExtraFiles = append(cmd.Env, env...), files
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait() // that it has ended is what counts
		close(d.ended)
	}()
	return d
}

func (d *daemon) pidFile() string { return filepath.Join(d.n.dir, d.name+".pid") }

// process returns the daemon's process id, as the node's processes see it.
func (d *daemon) process() (string, error) {
	pid, err := os.ReadFile(d.pidFile())
	return strings.TrimSpace(string(pid)), err
}

func (d *daemon) signal(sig syscall.Signal) error {
	pid, err := d.process()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return d.n.command(ctx, "sh", "-c", `kill -"$0" "$1"`, strconv.Itoa(int(sig)), pid).Run()
}

// end sends a signal and waits until the daemon is gone.
func (d *daemon) end(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := d.signal(sig); err != nil {
		t.Fatalf("end %s: %v", d.name, err)
	}
	select {
	case <-d.ended:
	case <-time.After(patience):
		t.Fatalf("%s did not end within %v of signal %d", d.name, patience, sig)
	}
}

// until waits for a condition; what is nil when it holds.
func until(t *testing.T, what func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = what(); err == nil {
			return
		}
	}
	t.Fatalf("after %v: %v", patience, err)
}

// alive is an error when the daemon has ended.
func (d *daemon) alive() error {
	select {
	case <-d.ended:
		return fmt.Errorf("%s has ended", d.name)
	default:
		return nil
	}
}
