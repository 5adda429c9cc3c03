// Package runner runs containers in a virtual machine whose init is
// tatami-guest, through crun or runc. In a Kata sandbox kata-agent does this.
//
// It lives in the supervisor, not in the worker, so that containers, their
// streams and their exit codes outlive a worker. It never opens a file of a
// container's root file system: that read would wait for the worker, which the
// supervisor is there to start again; package bundle does, in the worker.
//
// Lock order: Runner.mu, then container.mu; neither is held while waiting.
package runner

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Config says how containers are run.
type Config struct {
	Dir     string // bundles and the runtime's state; made when missing
	Runtime string // path or name of crun or runc; "" chooses
	// PowerOff is called once, after the answer to PowerOff is on its way.
	PowerOff func()
	Log      *slog.Logger
}

// Runner implements the Runner service.
type Runner struct {
	cfg     Config
	runtime string

	mu         sync.Mutex
	containers map[string]*container // by id
	closed     bool
}

var _ api.RunnerService = (*Runner)(nil)

// validID bounds what becomes the name of a directory and of a cgroup.
var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// New makes a runner. The runtime is looked for when the first container
// starts, so that a machine without one can still mount images.
func New(cfg Config) (*Runner, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.PowerOff == nil {
		cfg.PowerOff = func() {}
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "state"), 0o700); err != nil {
		return nil, fmt.Errorf("make the runner's directory: %w", err)
	}
	return &Runner{cfg: cfg, containers: make(map[string]*container)}, nil
}

// findRuntime returns the configured runtime, or the first that works here.
// crun starts faster, but version 1.8 works on unified cgroups only.
func (r *Runner) findRuntime() (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.runtime != "" {
		return r.runtime, nil
	}
	names := []string{"crun", "runc"}
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type != unix.CGROUP2_SUPER_MAGIC {
		names = []string{"runc", "crun"}
	}
	if r.cfg.Runtime != "" {
		names = []string{r.cfg.Runtime}
	}
	for _, n := range names {
		if p, err := exec.LookPath(n); err == nil {
			r.runtime = p
			return p, nil
		}
	}
	return "", fmt.Errorf("find an OCI runtime: none of %q is in PATH; install one or set runtime: %w", names, errdefs.ErrNotFound)
}

// Create writes the bundle. The root path of the configuration must be
// absolute already: see bundle.Prepare.
func (r *Runner) Create(_ context.Context, req *api.CreateRequest) (*api.CreateResponse, error) {
	if !validID.MatchString(req.Id) {
		return nil, fmt.Errorf("container id %q: use letters, digits, dots, dashes and underscores: %w", req.Id, errdefs.ErrInvalidArgument)
	}
	if err := checkPrepared(req.Spec); err != nil {
		return nil, fmt.Errorf("container %s: %w", req.Id, err)
	}
	c := newContainer(req.Id, filepath.Join(r.cfg.Dir, "bundles", req.Id))
	if err := r.add(c); err != nil {
		return nil, err
	}
	if err := c.writeBundle(req.Spec); err != nil {
		r.remove(c)
		return nil, fmt.Errorf("container %s: %w", req.Id, err)
	}
	return &api.CreateResponse{}, nil
}

func checkPrepared(b []byte) error {
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return fmt.Errorf("decode its runtime configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec.Root == nil || !filepath.IsAbs(spec.Root.Path) {
		return fmt.Errorf("its runtime configuration has no absolute root path: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func (r *Runner) add(c *container) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return fmt.Errorf("container %s: the machine is powering off: %w", c.id, errdefs.ErrUnavailable)
	}
	if r.containers[c.id] != nil {
		return fmt.Errorf("container %s exists: delete it first: %w", c.id, errdefs.ErrAlreadyExists)
	}
	r.containers[c.id] = c
	return nil
}

func (r *Runner) remove(c *container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.containers[c.id] == c {
		delete(r.containers, c.id)
	}
}

func (r *Runner) find(id string) (*container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: create it first: %w", id, errdefs.ErrNotFound)
}

// Start waits for the three streams and runs the process.
func (r *Runner) Start(ctx context.Context, req *api.StartRequest) (*api.StartResponse, error) {
	c, err := r.find(req.Id)
	if err != nil {
		return nil, err
	}
	runtime, err := r.findRuntime()
	if err != nil {
		return nil, err
	}
	pid, err := c.start(ctx, runtime, filepath.Join(r.cfg.Dir, "state"))
	if err != nil {
		return nil, fmt.Errorf("start container %s: %w", c.id, err)
	}
	return &api.StartResponse{Pid: int64(pid)}, nil
}

// Signal sends a signal to the container's first process.
func (r *Runner) Signal(_ context.Context, req *api.SignalRequest) (*api.SignalResponse, error) {
	c, err := r.find(req.Id)
	if err != nil {
		return nil, err
	}
	if err := c.signal(unix.Signal(req.Signal)); err != nil {
		return nil, fmt.Errorf("signal container %s: %w", c.id, err)
	}
	return &api.SignalResponse{}, nil
}

// Wait returns when the process has ended and its output is sent.
func (r *Runner) Wait(ctx context.Context, req *api.WaitRequest) (*api.WaitResponse, error) {
	c, err := r.find(req.Id)
	if err != nil {
		return nil, err
	}
	code, err := c.wait(ctx)
	if err != nil {
		return nil, fmt.Errorf("wait for container %s: %w", c.id, err)
	}
	return &api.WaitResponse{ExitCode: code}, nil
}

// Delete forgets a container. A process that still runs is killed, and output
// that was not taken by then is lost.
func (r *Runner) Delete(ctx context.Context, req *api.DeleteRequest) (*api.DeleteResponse, error) {
	c, err := r.find(req.Id)
	if err != nil {
		return nil, err
	}
	if err := c.delete(ctx); err != nil {
		return nil, fmt.Errorf("delete container %s: %w", c.id, err)
	}
	r.remove(c)
	return &api.DeleteResponse{}, nil
}

// PowerOff answers, then has the machine stopped.
func (r *Runner) PowerOff(context.Context, *api.PowerOffRequest) (*api.PowerOffResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.closed = true
		r.cfg.PowerOff()
	}
	return &api.PowerOffResponse{}, nil
}

// Close kills what runs and waits for it, bounded by ctx.
func (r *Runner) Close(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	var all []*container
	for _, c := range r.containers {
		all = append(all, c)
	}
	r.mu.Unlock()
	for _, c := range all {
		if err := c.delete(ctx); err != nil {
			return fmt.Errorf("close the runner: container %s: %w", c.id, err)
		}
		r.remove(c)
	}
	return nil
}
