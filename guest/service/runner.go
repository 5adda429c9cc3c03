package service

import (
	"context"
	"fmt"

	"github.com/tatami-containers/tatami/guest/bundle"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Runner passes the Runner service on to the supervisor, which keeps
// containers, and adds what only the worker knows: where images are mounted
// and what is in them.
type Runner struct {
	api.RunnerService // of the supervisor
	Guest             *Guest
}

// Create completes the runtime configuration and hands it on.
func (r *Runner) Create(ctx context.Context, req *api.CreateRequest) (*api.CreateResponse, error) {
	root, err := r.Guest.target(req.MountId)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", req.Id, err)
	}
	spec, err := bundle.Prepare(req.Spec, root)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", req.Id, err)
	}
	return r.RunnerService.Create(ctx, &api.CreateRequest{Id: req.Id, Spec: spec, MountId: req.MountId})
}

// Delete removes a container. What it has read until then was its start, if it was short.
func (r *Runner) Delete(ctx context.Context, req *api.DeleteRequest) (*api.DeleteResponse, error) {
	resp, err := r.RunnerService.Delete(ctx, req)
	if err == nil {
		r.Guest.starts.end(req.Id)
	}
	return resp, err
}
