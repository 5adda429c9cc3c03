package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/katavm/kata"
)

// runtime stands in for the agent's rustjail.
const runtime = "/usr/bin/crun"

// container is one container of the sandbox.
type container struct {
	id      string
	mounts  []string      // container_mounts: storages to clean up
	started bool          // protected by agent.mu
	done    chan struct{} // closed when the process has ended
	output  kata.Output   // valid after done
}

// validID is verify_id of src/libs/kata-sys-util/src/validate.rs.
var validID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// create is do_create_container of src/agent/src/rpc.rs. The lock is not held
// while storages are added: containers pull at the same time.
func (a *agent) create(ctx context.Context, req kata.CreateRequest) (none, error) {
	if !validID.MatchString(req.ContainerID) || req.OCI == nil || req.OCI.Root == nil || req.OCI.Process == nil {
		return none{}, fmt.Errorf("container id %q, or no spec", req.ContainerID)
	}
	mounts, err := a.addStorages(ctx, req.ContainerID, req.Storages)
	if err != nil {
		return none{}, err
	}
	// Before the bundle: what comes with a storage is undone with it.
	c := &container{id: req.ContainerID, mounts: mounts, done: make(chan struct{})}
	a.mu.Lock()
	a.containers[c.id] = c
	a.mu.Unlock()
	if err := a.process(req); err != nil {
		return none{}, err
	}
	return none{}, setUpBundle(c.id, req.OCI)
}

// process puts the pause process in the place of a sandbox's (get_process of
// src/agent/src/confidential_data_hub/image.rs).
func (a *agent) process(req kata.CreateRequest) error {
	for _, s := range req.Storages {
		if s.Driver == kata.GuestPull && isSandbox(req.OCI.Annotations) {
			_, pause, err := a.pause()
			if err != nil {
				return err
			}
			req.OCI.Process = pause.Process
			return nil
		}
	}
	return nil
}

// setUpBundle is setup_bundle of src/agent/src/rpc.rs: a rootfs that is there is
// used as it is, else the spec's is bound to its place; config.json is
// overwritten with the spec of the host.
func setUpBundle(id string, spec *specs.Spec) error {
	bundle := filepath.Join(kata.ContainerBase, id)
	rootfs := filepath.Join(bundle, "rootfs")
	if !exists(rootfs) {
		if err := os.MkdirAll(rootfs, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(spec.Root.Path, rootfs, "bind", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", spec.Root.Path, err)
		}
	}
	spec.Root.Path = rootfs
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o600)
}

func (a *agent) start(_ context.Context, req kata.ContainerRequest) (none, error) {
	c, err := a.find(req.ContainerID)
	if err != nil {
		return none{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c.started {
		return none{}, errors.New("container was started before")
	}
	c.started = true
	go func() {
		defer close(c.done)
		c.output = run(runtime, "run", "--bundle", filepath.Join(kata.ContainerBase, c.id), c.id)
	}()
	return none{}, nil
}

func (a *agent) wait(ctx context.Context, req kata.ContainerRequest) (kata.Output, error) {
	c, err := a.find(req.ContainerID)
	if err != nil {
		return kata.Output{}, err
	}
	select {
	case <-c.done:
		return c.output, nil
	case <-ctx.Done():
		return kata.Output{}, ctx.Err()
	}
}

func (a *agent) shell(_ context.Context, req kata.ShellRequest) (kata.Output, error) {
	return run("/bin/busybox", "sh", "-c", req.Script), nil
}

// run runs a program to its end.
func run(name string, args ...string) kata.Output {
	cmd := exec.Command(name, args...) //nolint:noctx // the test that waits for it is bounded
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return kata.Output{Stderr: err.Error(), Code: -1}
	}
	return kata.Output{Stdout: out.Bytes(), Stderr: errs.String(), Code: cmd.ProcessState.ExitCode()}
}
