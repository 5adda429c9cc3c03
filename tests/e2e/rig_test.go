package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// patience bounds one command; nothing here is to take so long.
const patience = 5 * time.Minute

// rig is a registry and a node.
type rig struct {
	t    *testing.T
	reg  *registrytest.Server
	root string // of the node
	tmp  string // for temporary files of our programs
}

func newRig(t *testing.T) *rig {
	t.Helper()
	tmp, err := os.MkdirTemp("", "e2e-") //nolint:usetesting // sockets are below it: the path must be short
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, reg: registrytest.Start(t, registrytest.Options{}), root: t.TempDir(), tmp: tmp}
	t.Cleanup(func() {
		if left := r.mounts(); len(left) > 0 {
			t.Errorf("left mounted:\n%s", strings.Join(left, "\n"))
		}
		if out, err := exec.Command("pgrep", "-af", "qemu-system.*"+r.tmp).Output(); err == nil {
			t.Errorf("virtual machines left:\n%s", out)
		}
		if left, err := os.ReadDir(r.tmp); err != nil || len(left) > 0 {
			t.Errorf("left in the temporary directory: %v %v", left, err)
		}
		_ = os.RemoveAll(r.tmp) // complained of above
	})
	return r
}

// ref names an image of the rig's registry.
func (r *rig) ref(name string) string { return r.reg.Host() + "/" + name }

// result of a command.
type result struct {
	stdout, stderr string
	code           int
	report         report
}

// report is the part of tatami's report that the tests look at.
type report struct {
	Digest         string `json:"manifest_digest"`
	Source         string `json:"source"`
	Index          string `json:"index"`
	Fetched        int64  `json:"fetched"`
	FetchedAtMount int64  `json:"fetched_at_mount"`
	Guest          struct {
		VerifyFailures int64            `json:"verify_failures"`
		Sources        map[string]int64 `json:"source_bytes"`
		Requests       map[string]int64 `json:"source_requests"`
		Resident       int64            `json:"resident_bytes"`
		Misses         int64            `json:"misses"`
		Replayed       int64            `json:"replayed_bytes"`
	} `json:"guest"`
}

// job is one `tatami run`.
type job struct {
	vm      string // "qemu" or "none"
	source  string // "relay" when empty
	flags   []string
	image   string
	command []string
	stdin   io.Reader
	root    string // of the node; the rig's own when empty
}

func (r *rig) command(ctx context.Context, j job) (*exec.Cmd, string) {
	r.t.Helper()
	root := j.root
	if root == "" {
		root = r.root
	}
	file := filepath.Join(r.t.TempDir(), "report.json")
	args := []string{"run", "--vm", j.vm, "--source", cmp.Or(j.source, "relay"), "--root", root, "--format", "json", "--report", file}
	args = append(args, j.flags...)
	args = append(args, j.image)
	if len(j.command) > 0 {
		args = append(append(args, "--"), j.command...)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "tatami"), args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Env = append(os.Environ(), "TMPDIR="+r.tmp)
	cmd.Stdin = j.stdin
	return cmd, file
}

// run runs a job to its end.
func (r *rig) run(j job) result {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	cmd, file := r.command(ctx, j)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatalf("%v: %v\n%s", cmd, err, errs.String())
	}
	res := result{stdout: out.String(), stderr: errs.String(), code: cmd.ProcessState.ExitCode()}
	if b, err := os.ReadFile(file); err == nil {
		if err := json.Unmarshal(b, &res.report); err != nil {
			r.t.Fatalf("report %q: %v", b, err)
		}
	}
	return res
}

// must runs a job that has to end with exit code 0.
func (r *rig) must(j job) result {
	r.t.Helper()
	res := r.run(j)
	if res.code != 0 {
		r.t.Fatalf("exit code %d\nstdout: %s\nstderr: %s\nhost: %s", res.code, res.stdout, res.stderr, r.hostLog())
	}
	return res
}

func (r *rig) hostLog() string {
	b, _ := os.ReadFile(filepath.Join(r.root, "tatami-host.log"))
	return string(b[max(0, len(b)-4000):])
}

// mounts lists what our programs have mounted. Their temporary directories lie
// in one of the test.
func (r *rig) mounts() []string {
	r.t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		r.t.Fatal(err)
	}
	var ours []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, r.tmp) || strings.Contains(line, r.root) {
			ours = append(ours, line)
		}
	}
	return ours
}
